"""Top-k, average precision and bootstrap against scikit-learn and hand-made cases."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, confusion_matrix, top_k_accuracy_score

from avtrain.data.manifest import ClipRow
from avtrain.transfer.metrics import bootstrap_means, confusion, interval, mean_average_precision, top_k
from avtrain.transfer.predictions import Metric, Predictions, ScoreSums, mean_metrics, metrics_of


@pytest.fixture
def random():
    return np.random.default_rng(5)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_top_k(random, k):
    scores, labels = random.standard_normal((200, 7)), random.integers(0, 7, 200)
    assert top_k(scores, labels, k).mean() == top_k_accuracy_score(labels, scores, k=k, labels=range(7))
    assert np.array_equal(confusion(scores, labels), confusion_matrix(labels, scores.argmax(1), labels=range(7)))


@pytest.mark.parametrize("decimals", [8, 1])  # 1: many ties
def test_mean_average_precision_over_classes_with_positives(random, decimals):
    scores, targets = random.random((60, 9)).round(decimals), random.random((60, 9)) < 0.2
    targets[:, 4] = False  # no positive: not counted
    rest = [column for column in range(9) if column != 4]
    expected = average_precision_score(targets[:, rest], scores[:, rest], average="macro")
    assert mean_average_precision(scores, targets) == pytest.approx([expected])
    assert np.isnan(mean_average_precision(scores, np.zeros_like(targets)))


def test_weights_count_a_video_several_times(random):
    scores, targets = random.random((40, 3)).round(1), random.random((40, 3)) < 0.4
    weights = random.integers(0, 3, (2, 40)).astype(float)
    for found, row in zip(mean_average_precision(scores, targets, weights), weights.astype(int), strict=True):
        many = np.repeat(np.arange(40), row)
        assert found == pytest.approx(average_precision_score(targets[many], scores[many], average="macro"))


def test_bootstrap_is_seeded_and_has_the_width_of_the_binomial(random):
    right = random.random(400) < 0.8
    low, high = interval(bootstrap_means(right, 0))
    assert (low, high) == interval(bootstrap_means(right, 0)) != interval(bootstrap_means(right, 1))
    assert low < right.mean() < high
    error = np.sqrt(right.mean() * (1 - right.mean()) / 400)
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.1)


def test_a_video_counts_once_and_has_the_labels_of_all_its_clips():
    import torch

    clips = [ClipRow((0, number), key, labels, 1, 1, 5.0, end_s) for number, (key, labels, end_s) in enumerate(
        [("a-0000", [0], 35.0), ("a-0001", [2], 15.0), ("b-1-0000", [1], 10.0)])]
    sums = ScoreSums(clips, 3)
    sums.add(["a-0000", "b-1-0000"], torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]))
    sums.add(["a-0001", "c-0000", "a-0002"], torch.tensor([[0.0, 0.0, 1.0], [9.0, 9.0, 9.0], [9.0, 9.0, 9.0]]))
    found = sums.predictions()
    assert found.videos == ["a", "b-1"] and found.labels == [[0, 2], [1]]
    assert found.scores.tolist() == [[0.75, 0, 0.25], [0, 1, 0]]  # 30 s of the first video, then 10 s
    assert metrics_of(found, True, 0)["map"].value == 100


def test_top5_is_left_out_where_it_says_nothing():
    few = Predictions(["a", "b"], [[0], [1]], np.eye(2))
    assert set(metrics_of(few, False, 0)) == {"top1"}
    many = Predictions(["a", "b"], [[0], [1]], np.eye(2, 6))
    assert set(metrics_of(many, False, 0)) == {"top1", "top5"} and metrics_of(many, False, 0)["top1"].value == 100


def test_mean_over_splits_is_narrower_than_a_split(random):
    splits = [{"top1": Metric(50.0 + 10 * number, 100 * bootstrap_means(random.random(100) < 0.5, number))}
              for number in range(3)]
    mean = mean_metrics(splits)["top1"]
    assert mean.value == 60
    assert mean.interval()[1] - mean.interval()[0] < 0.7 * (splits[0]["top1"].interval()[1]
                                                           - splits[0]["top1"].interval()[0])


def test_splits_of_one_seed_are_resampled_independently(random):
    split = {"top1": Metric(80.0, 100 * bootstrap_means(np.arange(80) < 64, 0))}
    low, high = mean_metrics([split] * 5)["top1"].interval()
    alone = split["top1"].interval()
    assert high - low == pytest.approx((alone[1] - alone[0]) / np.sqrt(5), rel=0.15)
