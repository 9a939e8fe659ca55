"""The folder of an evaluation: what is damaged there, what `--force` deletes; how often shards are opened for it."""

import pytest
from small_eval import VIEWS, results_of, run_eval, settings, times_of

from avtrain.data import shards


@pytest.mark.parametrize("damage", [
    lambda lines: lines[:-1], lambda lines: [*lines, lines[0]], lambda lines: [lines[0], *lines[2:], lines[0]],
    lambda lines: [line.replace('"labels": [0]', '"labels": [1]') for line in lines],
    lambda lines: [line.replace('"scores": [', '"scores": [0.5, ') for line in lines],
    lambda lines: [line.replace('"scores": [', '"scores": [NaN, ').replace(", 0.", ", -0.") for line in lines],
    lambda lines: ["{", *lines], None])
def test_damaged_validation_is_not_gone_on_with_but_made_again(tree, tmp_path, damage):
    options = ("--protocol", "knn", "--validation", "0.3", *settings(VIEWS))
    assert run_eval(tree, tmp_path, "kinetics-sounds", *options).exit_code == 0
    path, before = tmp_path / "split-1/validation.jsonl", results_of(tmp_path)
    lines = path.read_text().splitlines()
    if damage is not None:
        path.write_text("".join(line + "\n" for line in damage(lines)))
        done = run_eval(tree, tmp_path, "kinetics-sounds", *options)
        assert done.exit_code == 1 and f"{path} is " in done.output and "delete it" in done.output, done.output
    path.unlink()
    done = run_eval(tree, tmp_path, "kinetics-sounds", *options)
    assert done.exit_code == 0 and "finished already" not in done.output, done.output
    assert path.read_text().splitlines() == lines and results_of(tmp_path) == before


def test_force_begins_only_the_splits_anew_that_it_was_asked_for(tree_with_esc10, tmp_path):
    options = ("--protocol", "knn", "--recipe", "small", *settings(VIEWS))
    assert run_eval(tree_with_esc10, tmp_path, "esc10", *options, "--split", "1").exit_code == 0
    assert run_eval(tree_with_esc10, tmp_path, "esc10", *options, "--split", "2").exit_code == 0
    before, file = times_of(tmp_path), "split-{}/predictions.jsonl"
    done = run_eval(tree_with_esc10, tmp_path, "esc10", *options, "--split", "2", "--seed", "1", "--force")
    assert done.exit_code == 1 and "seed was 0 and is 1" in done.output, done.output
    assert "use the same again, --split all --force to begin anew, or another" in done.output
    assert times_of(tmp_path) == before
    done = run_eval(tree_with_esc10, tmp_path, "esc10", *options, "--split", "2", "--force")
    assert done.exit_code == 0, done.output
    after = times_of(tmp_path)
    assert after[tmp_path / file.format(1)] == before[tmp_path / file.format(1)]
    assert after[tmp_path / file.format(2)] > before[tmp_path / file.format(2)]
    (tmp_path / "settings.json").write_text("{")
    done = run_eval(tree_with_esc10, tmp_path, "esc10", *options, "--split", "2", "--force")
    assert done.exit_code == 1 and "settings.json is damaged: --split all --force begins anew" in done.output
    assert run_eval(tree_with_esc10, tmp_path, "esc10", *options, "--seed", "1", "--force").exit_code == 0
    assert list(results_of(tmp_path)["splits"]) == ["1", "2", "3", "4", "5"]
    assert results_of(tmp_path)["settings"]["seed"] == 1


def test_every_folder_is_opened_once(tree_with_esc10, tmp_path, monkeypatch):
    opened, open_whole = [], shards.parsed
    monkeypatch.setattr(shards, "parsed", lambda source, clips: opened.append(source) or open_whole(source, clips))
    done = run_eval(tree_with_esc10, tmp_path, "esc10", "--protocol", "knn", "--recipe", "small", *settings(VIEWS))
    assert done.exit_code == 0, done.output
    assert sorted(opened) == [str(tree_with_esc10 / "esc10" / f"fold{n}" / "clips.parquet") for n in range(1, 6)]
