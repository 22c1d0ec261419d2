"""Weighted k-means: what it minimises, how it starts, and that memory and chance are bounded."""

import pytest
import torch

from nanoquant import kmeans as module
from nanoquant.kmeans import LloydConfig, Points, assign, kmeans, lloyd, nearest, plus_plus, update


def random_points(n=60, G=5, g=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, G, g, generator=generator)
    weights = torch.rand(G, g, generator=generator).expand(n, G, g) + 0.1
    mass = (torch.rand(n, 1, generator=generator) + 0.1).expand(n, G)
    return Points(x, weights, mass)


def costs(points, centroids):
    """Cost of every point against all centroids (n, G, K), as the definition says, in float64."""
    difference = points.x.double().unsqueeze(-2) - centroids.double()
    return (points.weights.double().unsqueeze(-2) * difference.square()).sum(-1)


def total(points, centroids):
    return float((points.mass * costs(points, centroids).min(-1).values).sum())


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("chunk", [1, 2**12, 2**21])
def test_points_go_to_the_centroid_of_least_weighted_cost_in_chunks_of_any_size(monkeypatch, chunk):
    monkeypatch.setitem(module.CHUNK_BYTES, "cpu", chunk)
    points, centroids = random_points(), torch.randn(16, 3, generator=seeded(1))
    index, cost = assign(points, centroids)
    truth = costs(points, centroids)
    assert torch.equal(index.long(), truth.argmin(-1))
    torch.testing.assert_close(cost.double(), truth.min(-1).values, rtol=1e-4, atol=1e-5)
    best = nearest(points, centroids, 4)
    assert torch.equal(best.long(), truth.topk(4, largest=False).indices)
    assert nearest(points, centroids, 99).shape == (60, 5, 16)


@pytest.mark.parametrize("chunk", [1, 2**21])
def test_centroids_are_the_weighted_means_of_their_points(monkeypatch, chunk):
    monkeypatch.setitem(module.CHUNK_BYTES, "cpu", chunk)
    points = random_points()
    index = torch.randint(0, 4, points.x.shape[:2], generator=seeded(), dtype=torch.int16)
    means = update(points, index, torch.zeros(4, 3))
    weight = points.mass.unsqueeze(-1) * points.weights
    for k in range(4):
        own = index == k
        truth = (weight * points.x)[own].sum(0) / weight[own].sum(0)
        torch.testing.assert_close(means[k], truth)


def test_a_coordinate_without_weight_keeps_its_value_and_changes_no_assignment():
    points = random_points()
    weights = points.weights.clone()
    weights[..., 2] = 0
    points = points._replace(weights=weights)
    centroids = torch.randn(4, 3, generator=seeded(2))
    index, cost = assign(points, centroids)
    other = centroids.clone()
    other[:, 2] = 7
    assert torch.equal(assign(points, other)[0], index)
    assert torch.equal(update(points, index, other)[:, 2], other[:, 2])


def test_an_empty_cluster_moves_to_the_worst_point():
    points = random_points()
    points.x[7, 3] = 100.0
    centroids = torch.zeros(2, 3)
    centroids[1] = -1e6
    index, cost = assign(points, centroids)
    assert (index == 0).all()
    assert torch.equal(update(points, index, centroids, cost)[1], points.x[7, 3])
    assert torch.equal(update(points, index, centroids)[1], centroids[1])


def test_lloyd_lowers_the_cost_to_a_state_that_no_mean_improves():
    points = random_points(200)
    start = plus_plus(points, 8, seeded())
    few, many = (lloyd(points, start, LloydConfig(iterations=n, tolerance=0)) for n in (1, 200))
    assert total(points, many) < total(points, few) < total(points, start)
    index, cost = assign(points, many)
    torch.testing.assert_close(update(points, index, many, cost), many)


def test_clusters_that_lie_apart_are_found_one_by_one_and_points_without_mass_count_nothing():
    centers = 10 * torch.eye(8)
    x = centers.repeat(40, 1) + 0.01 * torch.randn(320, 8, generator=seeded())
    x = torch.cat([x, torch.full((50, 8), 300.0)]).unsqueeze(1)
    mass = torch.cat([torch.ones(320, 1), torch.zeros(50, 1)])
    found = kmeans(Points(x, torch.ones_like(x), mass), 8, seeded(), LloydConfig())
    order = found.argmax(1).argsort()
    torch.testing.assert_close(found[order], centers, atol=0.02, rtol=0)


def test_starts_are_drawn_by_cost_and_so_far_better_than_points_drawn_evenly():
    x = torch.cat([torch.zeros(1000, 2), torch.eye(2) * 50]).unsqueeze(1)  # two rare, far points
    points = Points(x, torch.ones_like(x), torch.ones(1002, 1))
    for seed in range(5):
        assert total(points, plus_plus(points, 3, seeded(seed))) == 0


def test_the_same_generator_gives_the_same_centroids_and_another_others():
    points, config = random_points(3000), LloydConfig(sample=64)
    first, again, other = (kmeans(points, 16, seeded(s), config) for s in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_a_sample_of_points_costs_little_against_all_of_them():
    points = random_points(6000, 5, 4)
    sampled, whole = (
        total(points, kmeans(points, 16, seeded(), LloydConfig(sample=n))) for n in (128, 10**6)
    )
    assert sampled <= 1.04 * whole


@pytest.mark.parametrize("value", [0.0, 3.5])
def test_points_that_are_all_equal_have_no_cost(value):
    x = torch.full((40, 2, 4), value)
    points = Points(x, torch.ones_like(x), torch.full((40, 2), value))
    centroids = kmeans(points, 16, seeded(), LloydConfig())
    assert centroids.isfinite().all() and total(points, centroids) == 0


def test_memory_beyond_the_points_is_bounded_however_many_centroids_there_are(monkeypatch):
    monkeypatch.setitem(module.CHUNK_BYTES, "cpu", 2**16)
    points, centroids = random_points(500, 16, 4), torch.randn(256, 4, generator=seeded())
    sizes = [scores.nbytes for _, _, scores in module.score(points, centroids)]
    assert max(sizes) <= 2**16 and sum(sizes) == 4 * 500 * 16 * 256


@pytest.mark.parametrize(
    "settings", [{"iterations": 0}, {"sample": 0}, {"tolerance": 1.0}, {"tolerance": -0.1}], ids=str
)
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        LloydConfig(**settings)
