import io
import sys
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_sae.callbacks import (
    FeatureDensityFigures,
    figures,
    plot_density_histogram,
    plot_rank_density,
)
from lightning_sae.metrics import FeatureDensity
from tests.callbacks.fakes import FakeSAE, tensors, trainer
from tests.helpers.ddp import run_on_two

TOKENS = 100_000
PLOTS = [plot_density_histogram, plot_rank_density]


def density(n_features=1000, dead=0.3):
    generator = torch.Generator().manual_seed(0)
    ranks = torch.arange(1, n_features + 1)
    alive = torch.rand(n_features, generator=generator) >= dead
    expected = TOKENS * 0.8 / (ranks + 1.0) * alive
    return (torch.poisson(expected, generator=generator) / TOKENS).clamp(max=1)


def events(logger):
    accumulator = EventAccumulator(logger.log_dir, size_guidance={"images": 0, "histograms": 0})
    return accumulator.Reload()


def texts(figure):
    (axes,) = figure.axes
    legend = axes.get_legend()
    labels = [text.get_text() for text in legend.get_texts()] if legend else []
    ticks = [tick.get_text() for tick in axes.get_xticklabels()]
    return " | ".join([axes.get_title(loc="left"), *labels, *ticks])


def test_tensorboard_receives_both_figures_and_the_histogram(tmp_path):
    logger = TensorBoardLogger(tmp_path, name="")
    run = trainer(tmp_path, FeatureDensityFigures(), logger=logger, max_epochs=2)
    module = FakeSAE()
    run.fit(module, tensors(3), tensors(2))
    run.test(module, tensors(2), verbose=False)

    found = events(logger)
    names = {"density_histogram", "density_by_rank"}
    assert set(found.Tags()["images"]) == {
        f"{stage}/{n}" for n in names for stage in ("val", "test")
    }
    assert set(found.Tags()["histograms"]) == {"val/log10_density", "test/log10_density"}
    for name in names:
        images = found.Images(f"val/{name}")
        assert [image.step for image in images] == [3, 6]  # not in the check before training
        image = Image.open(io.BytesIO(images[-1].encoded_image_string))
        image.load()
        assert image.size == (700, 450)
        assert len(image.getcolors(2**24)) > 10  # not blank
    histogram = found.Histograms("test/log10_density")[0].histogram_value
    assert histogram.num == sum(histogram.bucket) <= 40
    assert histogram.max <= 0
    assert len(histogram.bucket) > 10


@pytest.mark.parametrize("with_csv", [True, False])
def test_beside_a_csv_figures_are_files(tmp_path, with_csv):
    logger = CSVLogger(tmp_path, name="") if with_csv else False
    run = trainer(tmp_path, FeatureDensityFigures(), logger=logger)
    run.fit(FakeSAE(), tensors(), tensors())
    names = ["density_by_rank-0000004.png", "density_histogram-0000004.png"] if with_csv else []
    folder = tmp_path / "version_0/images/val"
    assert sorted(tmp_path.rglob("*.png")) == [folder / name for name in names]


def test_a_module_without_densities_is_told_so(tmp_path):
    logger = TensorBoardLogger(tmp_path, name="")
    module = FakeSAE()
    del module.feature_density
    module.validation_step = lambda batch: None
    module.on_validation_epoch_end = lambda: None
    run = trainer(tmp_path, FeatureDensityFigures(), logger=logger)
    with pytest.warns(UserWarning, match=r"draws nothing: FakeSAE has no FeatureDensity metric$"):
        run.fit(module, tensors(), tensors())
    assert events(logger).Tags()["images"] == []


def draw_on_rank(rank):
    drawn = []
    record = lambda density, tokens: drawn.append((density.tolist(), tokens))  # noqa: E731 - a stub
    figures.plot_density_histogram = figures.plot_rank_density = record
    logger = TensorBoardLogger.__new__(TensorBoardLogger)
    nothing = lambda *args, **kwargs: None  # noqa: E731 - a stub
    logger._experiment = SimpleNamespace(add_figure=nothing, add_histogram=nothing)
    metric = FeatureDensity(2)
    codes = torch.tensor([[1.0, 0.0], [1.0, 2.0], [1.0, 0.0], [0.0, 0.0]])
    metric.update(codes[:1] if rank == 0 else codes[1:])
    fake_trainer = SimpleNamespace(
        is_global_zero=rank == 0,
        loggers=[logger],
        global_step=1,
        sanity_checking=False,
    )
    module = FakeSAE()
    module.feature_density = metric
    FeatureDensityFigures().on_validation_epoch_end(fake_trainer, module)
    return drawn


def test_two_ranks_measure_together_and_one_draws():
    on_first, on_second = run_on_two(draw_on_rank)
    assert on_first == [([0.75, 0.25], 4)] * 2
    assert on_second == []


def test_histogram_counts_every_feature():
    measured = density()
    live, dead = int((measured > 0).sum()), int((measured == 0).sum())
    figure = plot_density_histogram(measured, TOKENS)
    steps, bar = figure.axes[0].patches
    assert sum(steps.get_data().values) == live
    assert bar.get_height() == dead
    assert f"dead:\n{dead}" in texts(figure)
    assert "1,000 features on 100,000 tokens, 3" in texts(figure)
    assert "% dead" in texts(figure)


def test_histogram_does_not_lose_the_rarest_and_the_densest():
    for tokens in (1, 3, 1000, 10**6):
        figure = plot_density_histogram(torch.tensor([1 / tokens, 1.0]), tokens)
        assert sum(figure.axes[0].patches[0].get_data().values) == 2


def test_histogram_stays_readable_when_nearly_all_are_dead():
    figure = plot_density_histogram(density(dead=0.97), TOKENS)
    highest = max(figure.axes[0].patches[0].get_data().values)
    assert figure.axes[0].get_ylim()[1] < 4 * highest


def test_rank_plot_shows_data_law_and_goodness():
    measured = density()
    figure = plot_rank_density(measured, TOKENS)
    points, curve = figure.axes[0].lines
    ranks = points.get_xdata()
    live = int((measured > 0).sum())
    assert ranks[0] == 1
    assert ranks[-1] == live
    largest_first = measured.double().sort(descending=True).values.numpy()
    assert (points.get_ydata() == largest_first[ranks - 1]).all()
    assert curve.get_ydata()[50] == pytest.approx(points.get_ydata()[50], rel=0.2)
    for part in ("live features", "Zipf-Mandelbrot: s = ", "q = ", "$R^2$ = ", "% dead"):
        assert part in texts(figure)


def test_rank_plot_of_many_features_draws_a_selection():
    figure = plot_rank_density(0.5 / torch.arange(1, 500_001), 10**9)
    ranks = figure.axes[0].lines[0].get_xdata()
    assert len(ranks) < 10_000
    assert ranks[-1] == 500_000


def test_rank_plot_without_a_fit_says_so():
    for few in (torch.zeros(50), torch.tensor([0.5, 0.1, 0.0])):
        figure = plot_rank_density(few, TOKENS)
        assert "too few live features for a Zipf fit" in texts(figure)
        figure.savefig(io.BytesIO())


@pytest.mark.parametrize("plot", PLOTS)
def test_figures_belong_to_no_window(plot):
    figure = plot(density(), TOKENS)
    assert figure.canvas.manager is None
    pyplot = sys.modules.get("matplotlib.pyplot")  # TensorBoard imports it to render
    assert pyplot is None or pyplot.get_fignums() == []


@pytest.mark.parametrize("plot", PLOTS)
@pytest.mark.parametrize(
    ("wrong", "tokens"),
    [(torch.tensor([0.5]), 0), (torch.tensor([[0.5]]), 9), (torch.tensor([torch.nan]), 9)],
)
def test_bad_densities_are_refused(plot, wrong, tokens):
    with pytest.raises(ValueError, match=f"tokens={tokens} must be > 0, density of shape="):
        plot(wrong, tokens)
