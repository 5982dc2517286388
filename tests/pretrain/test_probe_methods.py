"""The probes' arithmetic against slow references: ridge, kNN votes, Dice, rank, alarms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain import collapse, knn, linear_probe
from pretrain.shots import THRESHOLDS, Shot, alike, dice, dice_by_threshold, overlap, tally


def shots_of(
    seed: int, number: int = 4, n: int = 30, d: int = 5, p: int = 6, classes: int = 2, noise: float = 0.3
) -> list[Shot]:
    """Images whose voxels depend on the features linearly, with some unknown voxels."""
    rng = torch.Generator().manual_seed(seed)
    maps = torch.randn(classes, d, p, generator=torch.Generator().manual_seed(77))
    found = []
    for _ in range(number):
        x = torch.randn(n, d, generator=rng) * torch.tensor([1.0, 5.0, 0.1, 2.0, 1.0])[:d] + 3
        scores = (x - 3) @ maps + noise * torch.randn(classes, n, p, generator=rng)
        known = torch.rand(n, p, generator=rng) > 0.02
        found.append(Shot(x, scores > 0.5, known, known.all(1), (True,) * classes))
    return found


def test_the_fit_is_penalised_least_squares(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against numpy's lstsq on standardised features with the penalty as further rows."""
    monkeypatch.setattr(linear_probe, "RIDGES", (0.07,))
    shots = shots_of(0)
    fitted = linear_probe.fit(shots)
    x = np.concatenate([s.features[s.learnable].numpy() for s in shots]).astype(np.float64)
    mean, deviation = x.mean(0), x.std(0)
    scaled = (x - mean) / deviation
    assert sorted(fitted) == [0, 1]
    for label, linear in fitted.items():
        y = np.concatenate([s.truth[label][s.learnable].numpy() for s in shots]).astype(np.float64)
        penalty = math.sqrt(0.07 * len(x)) * np.eye(x.shape[1])  # the mean diagonal of standardised features
        rows, targets = np.vstack([scaled, penalty]), np.vstack([y - y.mean(0), np.zeros((5, 6))])
        weight = np.linalg.lstsq(rows, targets, rcond=None)[0]
        new = torch.randn(7, 5, generator=torch.Generator().manual_seed(1)) * 4
        expected = (new.numpy().astype(np.float64) - mean) / deviation @ weight + y.mean(0)
        np.testing.assert_allclose(linear.score(new).numpy(), expected, rtol=1e-9, atol=1e-9)


def test_ridge_and_threshold_have_the_best_dice_on_shots_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    shots = shots_of(1, number=5, noise=2.0)
    fitted = linear_probe.fit(shots)
    left_out: dict[tuple[int, float, float], float] = {}
    mean, deviation = linear_probe._moments(torch.cat([s.features[s.learnable] for s in shots]).double())
    same = [s._replace(features=(s.features.double() - mean) / deviation) for s in shots]
    counts: dict[tuple[int, float, float], np.ndarray] = {}
    for ridge in linear_probe.RIDGES:
        for fold in range(4):
            kept = [s for n, s in enumerate(same) if n % 4 != fold]
            x = torch.cat([s.features[s.learnable] for s in kept])
            for label in range(2):
                y = torch.cat([s.truth[label][s.learnable] for s in kept]).double()
                centred = x - x.mean(0)
                gram = centred.T @ centred
                gram += ridge * gram.diagonal().mean() * torch.eye(5)
                weight = torch.linalg.solve(gram, centred.T @ (y - y.mean(0)))
                for shot in same[fold::4]:
                    score = (shot.features - x.mean(0)) @ weight + y.mean(0)
                    for t in THRESHOLDS:
                        found = np.array(overlap(score > t, shot.truth[label], shot.known))
                        counts[label, ridge, t] = counts.get((label, ridge, t), 0) + found
    for key, (both, found, true) in counts.items():
        left_out[key] = 2 * both / (found + true)
    for label, linear in fitted.items():
        best = max(value for key, value in left_out.items() if key[0] == label)
        assert left_out[label, linear.ridge, linear.threshold] == pytest.approx(best, abs=1e-12)
        assert best > min(v for key, v in left_out.items() if key[0] == label)


def test_linear_features_are_read_off_and_noise_is_not() -> None:
    *shots, case = shots_of(2, number=7, n=200, noise=0.0)
    for label, linear in linear_probe.fit(shots).items():
        read = dice(*overlap(linear.segment(case.features), case.truth[label], case.known))
        noise = torch.randn(case.features.shape, generator=torch.Generator().manual_seed(0))
        guessed = dice(*overlap(linear.segment(noise + 3), case.truth[label], case.known))
        assert read is not None
        assert guessed is not None
        assert read > max(0.85, guessed + 0.2)


def test_ignored_tokens_and_images_without_the_class_teach_nothing() -> None:
    shots = shots_of(3)
    shots[0].learnable[4] = False
    shots[1] = shots[1]._replace(annotated=(True, False))
    before = linear_probe.fit(shots)
    shots[0].truth[:, 4] ^= True
    shots[0].known[4] = False
    known_before = linear_probe.fit(shots)
    shots[0].truth[:, 4] ^= True
    after = linear_probe.fit(shots)
    assert torch.equal(known_before[0].weight, after[0].weight)
    assert torch.equal(before[0].weight, after[0].weight)
    shots[1].truth[1] ^= True  # of the class that was not looked for
    changed = linear_probe.fit(shots)
    assert all(torch.equal(changed[label].weight, after[label].weight) for label in (0, 1))
    shots[1].truth[0] ^= True
    assert not torch.equal(linear_probe.fit(shots)[0].weight, after[0].weight)


def test_more_classes_than_are_fitted_together(monkeypatch: pytest.MonkeyPatch) -> None:
    shots = shots_of(4, classes=5)
    together = linear_probe.fit(shots)
    monkeypatch.setattr(linear_probe, "TOGETHER", 1)
    for label, linear in linear_probe.fit(shots).items():
        torch.testing.assert_close(linear.weight, together[label].weight)
        assert (linear.ridge, linear.threshold) == (together[label].ridge, together[label].threshold)


def test_equal_features_are_no_error() -> None:
    shots = [s._replace(features=torch.ones_like(s.features)) for s in shots_of(5)]
    assert all(linear.weight.isfinite().all() for linear in linear_probe.fit(shots).values())


def test_neighbours_vote_with_the_labels_of_their_own_voxels() -> None:
    shots = shots_of(6, number=3, n=9)
    k = 4
    queries = torch.randn(8, 5, generator=torch.Generator().manual_seed(5)) + 2
    probe = knn.Knn(shots, k)
    ((_, bank, thresholds),) = probe.banks
    votes = bank.votes(queries, k)
    tokens = [(s, i) for s in shots for i in range(9)]
    for label in range(2):
        for q in range(8):
            cosine = [
                float(torch.nn.functional.cosine_similarity(queries[q], s.features[i], dim=0))
                for s, i in tokens
            ]
            near = sorted(range(len(tokens)), key=lambda n: -cosine[n])[:k]
            for voxel in range(6):
                for_it = everyone = 0.0
                for n in near:
                    shot, i = tokens[n]
                    if shot.known[i, voxel]:
                        weight = math.exp(cosine[n] / 0.07)
                        everyone += weight
                        for_it += weight * bool(shot.truth[label, i, voxel])
                expected = for_it / everyone if everyone else 0.0
                assert float(votes[label, q, voxel]) == pytest.approx(expected, abs=1e-4)
        assert torch.equal(probe.segment(queries)[label], votes[label] > thresholds[label])


def test_the_threshold_of_knn_has_the_best_dice_where_each_shot_is_left_out() -> None:
    shots = shots_of(7)
    ((_, _, chosen),) = knn.Knn(shots, 5).banks
    for label in range(2):
        figures = []
        for t in THRESHOLDS:
            total = np.zeros(3)
            for n, shot in enumerate(shots):
                others = knn._bank(shots[:n] + shots[n + 1 :])
                total += overlap(others.votes(shot.features, 5)[label] > t, shot.truth[label], shot.known)
            figures.append(2 * total[0] / (total[1] + total[2]))
        assert figures[THRESHOLDS.index(chosen[label])] == pytest.approx(max(figures), abs=1e-12)


def test_knn_takes_more_neighbours_than_there_are() -> None:
    shots = shots_of(8, number=2, n=3)
    assert knn.Knn(shots, 50).segment(torch.randn(4, 5))[1].shape == (4, 6)


def test_classes_go_together_by_the_images_that_are_annotated_for_them() -> None:
    shots = [s._replace(annotated=a) for s, a in zip(shots_of(9, number=3), [(True, True), (True, False)])]
    assert alike(shots) == {(0, 1): [0], (0,): [1]}


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 4), st.integers(1, 9))
def test_dice_at_every_threshold_counts_known_voxels_only(seed: int, classes: int, n: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    scores = torch.randint(-5, 60, (classes, n, 3), generator=rng).double() / 50  # on the limits too
    truth = torch.rand(classes, n, 3, generator=rng) > 0.5
    known = torch.rand(n, 3, generator=rng) > 0.3
    figures = dice_by_threshold(tally(scores, truth, known))
    for label in range(classes):
        for place, t in enumerate(THRESHOLDS):
            expected = dice(*overlap(scores[label] > t, truth[label], known))
            assert float(figures[label, place]) == pytest.approx(expected or 0.0)


def test_dice_of_absent_classes() -> None:
    some, none = torch.tensor([True, False]), torch.zeros(2, dtype=torch.bool)
    known = torch.ones(2, dtype=torch.bool)
    assert dice(*overlap(none, none, known)) is None
    assert dice(*overlap(some, none, known)) == 0.0
    assert dice(*overlap(none, some, known)) == 0.0
    assert dice(*overlap(some, some, known)) == 1.0
    assert dice(*overlap(some, some, ~some)) is None  # the only voxel of the class is unknown


@pytest.mark.parametrize("spectrum", [[1.0, 1.0, 1.0, 1.0], [4.0, 2.0, 1.0, 1.0], [1.0, 0.0, 0.0, 0.0]])
def test_rank_of_a_known_spectrum(spectrum: list[float]) -> None:
    n = 64
    basis = torch.linalg.qr(torch.randn(n, 5, generator=torch.Generator().manual_seed(0)).double())[0]
    left = basis - basis.mean(0)
    left = torch.linalg.qr(left)[0][:, :4]  # orthonormal and centred
    right = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(1)).double())[0]
    features = left @ torch.diag(torch.tensor(spectrum).double()) @ right + 0.5
    share = np.array(spectrum) / sum(spectrum)
    expected = math.exp(-sum(s * math.log(s) for s in share if s > 0))
    found = collapse.spread([features[:20], features[20:]])
    assert found["rank"] == pytest.approx(expected, rel=1e-6)
    assert found["rank_share"] == pytest.approx(expected / 4, rel=1e-6)


def test_cosine_is_the_mean_over_pairs_of_tokens() -> None:
    x = torch.randn(11, 6, generator=torch.Generator().manual_seed(3)) + 0.5
    pairs = [
        torch.nn.functional.cosine_similarity(x[i], x[j], dim=0).item()
        for i in range(11)
        for j in range(11)
        if i != j
    ]
    assert collapse.spread([x[:4], x[4:]])["cosine"] == pytest.approx(np.mean(pairs), abs=1e-6)


def test_equal_tokens_have_no_rank_even_with_rounding_errors() -> None:
    token = torch.randn(1, 48, generator=torch.Generator().manual_seed(0)).sign()
    wobble = 1 + 1e-3 * torch.randn(500, 48, generator=torch.Generator().manual_seed(1))
    found = collapse.spread([(token * wobble).bfloat16().float()])
    assert found["rank"] == 0.0
    assert found["cosine"] > 0.999
    named = {f"collapse/{name}": value for name, value in found.items()}
    assert len(collapse.alarms(named)) == 2


def entropies(least: float, mean: float, most: float, block: float) -> dict[str, float]:
    names = ("min", "mean", "max", "block_min")
    return {f"collapse/attention_entropy_{n}": v for n, v in zip(names, (least, mean, most, block))}


def test_alarms_tell_collapse_from_a_start() -> None:
    healthy = {"collapse/rank_share": 0.3, "collapse/cosine": 0.4, **entropies(0.4, 0.6, 0.8, 0.5)}
    uniform = healthy | entropies(0.99, 0.99, 1.0, 0.99)
    assert collapse.alarms(healthy) == []
    assert collapse.alarms(healthy, [uniform, healthy | {"collapse/rank_share": 0.6}]) == []
    assert collapse.alarms(uniform) == []
    assert collapse.alarms(uniform, [uniform]) == []
    (line,) = collapse.alarms(uniform, [uniform, healthy])
    assert "all tokens alike" in line
    (line,) = collapse.alarms(healthy | entropies(0.0, 0.5, 0.9, 0.01))
    assert "one token" in line
    (line,) = collapse.alarms(healthy | {"collapse/rank_share": 0.09}, [healthy])
    assert "9.0% of their width, 30.0% at" in line
    (line,) = collapse.alarms(healthy | {"collapse/rank_share": 0.04}, [healthy])
    assert "collapsed" in line
    assert collapse.alarms({}) == []


def test_attention_is_summed_up_over_images_with_a_choice() -> None:
    entropy = torch.tensor([[[0.2, 0.4], [0.6, 0.8]], [[0.4, 0.6], [0.6, 1.0]], [[math.nan] * 2] * 2])
    found = collapse.attention(entropy)
    assert found["attention_entropy_min"] == pytest.approx(0.3)
    assert found["attention_entropy_max"] == pytest.approx(0.9)
    assert found["attention_entropy_mean"] == pytest.approx((0.3 + 0.5 + 0.6 + 0.9) / 4)
    assert found["attention_entropy_block_min"] == pytest.approx(0.4)
    assert collapse.attention(entropy[2:]) == {}
