"""One run in one process, and the same run in several, as torchrun starts them: the same losses, clip for clip."""

import shutil
import tarfile

import pytest
from forked import forked
from many_processes import agree, arguments, losses, run


@pytest.fixture(scope="module")
def damaged(all_kinds, tmp_path_factory):
    """The same, with pictures of three clips that can't be decoded."""
    folder = shutil.copytree(all_kinds, tmp_path_factory.mktemp("damaged") / "train")
    left = 3
    for shard in sorted(folder.glob("*.tar")):
        with tarfile.open(shard) as archive:
            members = [member for member in archive if member.name.endswith(".mp4")][:1]
        for member in members[:left]:
            left -= 1
            with shard.open("r+b") as file:
                file.seek(member.offset_data)
                file.write(bytes(member.size))
    assert left == 0
    return folder


@pytest.fixture(scope="module")
def alone(all_kinds, tmp_path_factory):
    """The undisturbed run of one process."""
    out = tmp_path_factory.mktemp("alone") / "run"
    code, printed = run(all_kinds, out, 1)
    assert code == 0, printed
    return out


def test_two_processes_are_one_run(all_kinds, tmp_path):
    one, two = forked(*((ranks, arguments(all_kinds, tmp_path / str(ranks))[1:]) for ranks in (1, 2)))
    assert (one[0], two[0]) == ([0], [0, 0]), (one, two)
    agree(losses(tmp_path / "1"), losses(tmp_path / "2"), 1e-8)
    assert two[1].count("step 8 of 8") == 1  # one of them speaks


@pytest.mark.slow
def test_two_processes_of_torchrun_are_one_run(all_kinds, alone, tmp_path):
    code, printed = run(all_kinds, tmp_path / "two", 2)
    assert code == 0, printed
    agree(losses(alone), losses(tmp_path / "two"), 1e-8)


STEPS = ["--set", "training.steps=50", "--set", "training.save_every=50", "--set", "training.evaluate_every=50"]
MODES = {"plain": [], "parts": ["training.micro_batch=MICRO"], "stages run again": ["model.stages_recomputed=1"],
         "early fusion, similar negatives": ["model.fusion=early", "objectives.negatives=64"],
         "late fusion, random negatives": ["model.fusion=late", "objectives.sampling=random"]}


def _settings(settings, micro_batch):
    """As options; MICRO is that."""
    return [part for setting in settings for part in ("--set", setting.replace("MICRO", str(micro_batch)))]


@pytest.fixture(scope="module")
def alone_in(all_kinds, damaged, tmp_path_factory):
    """mode -> the run of one process in it, 50 steps; made once."""
    made = {}

    def of(mode, precision="float64"):
        if (mode, precision) not in made:
            out = tmp_path_factory.mktemp("mode") / "run"
            code, printed = run(damaged if mode == "unreadable" else all_kinds, out, 1, *STEPS,
                                *_settings(MODES.get(mode, []), 4), precision=precision)
            assert code == 0, printed
            made[mode, precision] = losses(out)
        return made[mode, precision]

    return of


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "ranks"), [
    ("plain", 2), ("plain", 4), ("parts", 2), ("parts", 4), ("unreadable", 2), ("unreadable", 4),
    ("stages run again", 2), ("early fusion, similar negatives", 2), ("late fusion, random negatives", 2)])
def test_any_number_of_processes_is_one_run(all_kinds, damaged, alone_in, tmp_path, mode, ranks):
    """Part j of the one process is the union of the processes' parts j."""
    code, printed = run(damaged if mode == "unreadable" else all_kinds, tmp_path / "run", ranks, *STEPS,
                        *_settings(MODES.get(mode, []), 4 // ranks))
    assert code == 0, printed
    agree(alone_in(mode), losses(tmp_path / "run"), 1e-8)


@pytest.mark.slow
def test_in_float32_they_stay_close(all_kinds, alone_in, tmp_path):
    code, printed = run(all_kinds, tmp_path / "run", 2, *STEPS, precision="float32")
    assert code == 0, printed
    both = [[line["loss"] for line in found] for found in (alone_in("plain", "float32"), losses(tmp_path / "run"))]
    assert both[1][:10] == pytest.approx(both[0][:10], rel=1e-4)
    assert both[1][:40] == pytest.approx(both[0][:40], rel=1e-2)


@pytest.mark.slow
def test_a_run_goes_on_with_any_number_of_processes_and_workers(all_kinds, alone_in, tmp_path):
    """In the middle of an epoch: the same batches from there, none twice, none missed."""
    for ranks, workers, until in ((1, 0, 13), (2, 8, 22), (4, 1, 37), (1, 1, 50)):
        code, printed = run(all_kinds, tmp_path / "run", ranks, *STEPS, "--set", f"data.workers={workers}",
                            "--max-steps", until)
        assert code == 0, printed
    mine = [{name: value for name, value in line.items() if not name.startswith("test_")}
            for line in losses(tmp_path / "run")]
    whole = [{name: value for name, value in line.items() if not name.startswith("test_")}
             for line in alone_in("plain")]
    agree(whole, mine, 1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [["objectives.negatives_from=local"], ["training.sync_batchnorm=false"],
                                      ["objectives.negatives_from=local", "training.sync_batchnorm=false"]])
def test_each_for_itself_is_another_run_that_trains_too(all_kinds, alone_in, tmp_path, settings):
    code, printed = run(all_kinds, tmp_path / "run", 2, *STEPS, *_settings(settings, 0))
    assert code == 0, printed
    one, other = alone_in("plain"), losses(tmp_path / "run")
    assert other[0]["loss"] != pytest.approx(one[0]["loss"], rel=1e-6)
    assert other[-1]["skipped_steps"] == 0
    of_chance = [line["loss"] / line["chance_loss"] for line in other]  # batches differ in what can be predicted
    assert sum(of_chance[-10:]) < 0.97 * sum(of_chance[:10])
