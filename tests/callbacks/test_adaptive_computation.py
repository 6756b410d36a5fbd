import io

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_sae.allocation import token_choice
from lightning_sae.callbacks import (
    AdaptiveComputationCallback,
    plot_matches_by_loss,
    plot_matches_per_token,
)
from tests.callbacks.fakes import (
    LENGTH,
    FakeData,
    FakeLanguageModel,
    FakeSAE,
    first_contexts,
    tensors,
    trainer,
)

NAMES = ("surprise", "next_loss", "distance")


@pytest.fixture(autouse=True)
def _same_weights():
    torch.manual_seed(0)


@torch.no_grad()
def expected(module, batches):
    """The correlations from lists of numbers, token by token."""
    model, columns = FakeLanguageModel(), {name: [] for name in ("matches", *NAMES)}
    for batch in batches:
        logits = model.embeddings[batch["input_ids"]] @ model.embeddings.T
        log_p, ids = logits.log_softmax(-1), batch["input_ids"]
        for x, (c, t) in zip(batch["activations"], batch["kept"].nonzero().tolist(), strict=True):
            if 0 < t < LENGTH - 1:
                columns["matches"].append((module.encoder(x) > 0.3).sum())
                columns["surprise"].append(-log_p[c, t - 1, ids[c, t]])
                columns["next_loss"].append(-log_p[c, t, ids[c, t + 1]])
                columns["distance"].append((x - 0.25).square().sum().sqrt())
    rows = torch.tensor(list(columns.values()), dtype=torch.float64)
    return dict(zip(NAMES, rows.corrcoef()[0, 1:].tolist(), strict=True))


@pytest.mark.parametrize("stage", ["val", "test"])
@pytest.mark.parametrize(("tokens", "measured"), [(31, 6), (1000, 15)])
def test_correlations_are_the_obvious_ones(tmp_path, stage, tokens, measured):
    module, data = FakeSAE(), FakeData()
    run = trainer(tmp_path, AdaptiveComputationCallback(tokens=tokens))
    for _ in range(2):  # each time anew
        evaluate = run.validate if stage == "val" else run.test
        (logged,) = evaluate(module, datamodule=data, verbose=False)
        wanted = expected(module, first_contexts(measured, data.batches))
        for name in NAMES:
            found = logged[f"{stage}/l0_correlation_{name}"]
            assert found == pytest.approx(wanted[name], abs=1e-5), name
            assert abs(found) > 0.01, name


def test_while_training_and_not_in_the_check_before(tmp_path):
    class Uncalibrated(FakeSAE):
        def match(self, x):
            assert self.tokens_seen > 0
            return super().match(x)

    logger = CSVLogger(tmp_path, name="")
    run = trainer(tmp_path, AdaptiveComputationCallback(), logger=logger, max_epochs=2)
    run.fit(Uncalibrated(), datamodule=FakeData())
    assert run.num_sanity_val_steps > 0
    assert {f"val/l0_correlation_{name}" for name in NAMES} <= run.callback_metrics.keys()


class Equal(FakeSAE):
    """Every token gets three matches."""

    def match(self, x):
        return token_choice(self.encoder(x) + 100, k=3)


def events(logger):
    return EventAccumulator(logger.log_dir, size_guidance={"images": 0}).Reload()


def test_without_spread_nothing_but_figures_is_logged(tmp_path):
    logger = TensorBoardLogger(tmp_path, name="")
    run = trainer(tmp_path, AdaptiveComputationCallback(), logger=logger)
    (logged,) = run.validate(Equal(), datamodule=FakeData(), verbose=False)
    assert logged == {}
    found = {"val/matches_by_surprise", "val/matches_per_token"}
    assert set(events(logger).Tags()["images"]) == found


def test_figures_of_every_validation_and_test(tmp_path):
    logger = TensorBoardLogger(tmp_path, name="")
    run = trainer(tmp_path, AdaptiveComputationCallback(), logger=logger, max_epochs=2)
    module = FakeSAE()
    run.fit(module, datamodule=FakeData())
    run.test(module, datamodule=FakeData(), verbose=False)
    found = events(logger)
    for name in ("matches_by_surprise", "matches_per_token"):
        assert [image.step for image in found.Images(f"val/{name}")] == [3, 6]
        assert len(found.Images(f"test/{name}")) == 1


@pytest.mark.parametrize("data", ["tensors", "no language model", "nothing kept", "too short"])
def test_data_without_anything_to_measure_is_left_alone(tmp_path, data):
    logger = TensorBoardLogger(tmp_path, name="")
    run = trainer(tmp_path, AdaptiveComputationCallback(), logger=logger)
    if data == "tensors":
        logged = run.validate(FakeSAE(), tensors(), verbose=False)
    else:
        datamodule = FakeData(residual_stream=data != "no language model")
        for batch in datamodule.batches:
            if data == "nothing kept":
                batch["kept"][:] = False
            if data == "too short":
                batch["kept"], batch["input_ids"] = batch["kept"][:, :2], batch["input_ids"][:, :2]
            batch["activations"] = batch["activations"][: int(batch["kept"].sum())]
        logged = run.validate(FakeSAE(), datamodule=datamodule, verbose=False)
    assert logged == [{}]
    assert events(logger).Tags()["images"] == []


def test_plot_by_loss_shows_mean_and_middle_half_of_each_tenth():
    loss = torch.arange(1000.0).flip(0)
    matches = (loss / 100).floor() * 10 + torch.tensor([0, 1, 2, 7]).repeat(250)
    figure = plot_matches_by_loss(matches, loss)
    (line,) = figure.axes[0].lines
    assert line.get_ydata() == pytest.approx([10 * tenth + 2.5 for tenth in range(10)])
    band = figure.axes[0].collections[0].get_paths()[0].vertices
    for tenth in range(10):
        heights = band[band[:, 0] == tenth + 1, 1]
        assert min(heights) == pytest.approx(10 * tenth + 0.75)
        assert max(heights) == pytest.approx(10 * tenth + 3.25)
    labels = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert labels[0] == "49"
    assert len(labels) == 10
    assert "1,000 tokens" in figure.axes[0].get_title(loc="left")
    figure.savefig(io.BytesIO())


@pytest.mark.parametrize("tokens", [1, 7])
def test_plots_of_few_tokens(tokens):
    matches = torch.arange(tokens)
    figure = plot_matches_by_loss(matches, matches.float())
    assert figure.axes[0].lines[0].get_ydata().tolist() == list(range(tokens))
    plot_matches_per_token(matches).savefig(io.BytesIO())


@pytest.mark.parametrize("most", [0, 10, 59, 60, 1000, 100_000])
def test_histogram_counts_every_token_in_bars_of_equal_numbers_of_values(most):
    generator = torch.Generator().manual_seed(0)
    matches = torch.randint(3, 4 + most, (5000,), generator=generator)
    figure = plot_matches_per_token(matches)
    values, edges, _ = figure.axes[0].patches[0].get_data()
    assert values.sum() == 5000
    assert len(values) <= 60
    widths = set((edges[1:] - edges[:-1]).tolist())
    assert len(widths) == 1
    assert widths.pop().is_integer()
    for value, low, high in zip(values, edges[:-1], edges[1:], strict=True):
        assert value == ((matches > low) & (matches < high)).sum()


@pytest.mark.parametrize(
    ("matches", "loss"), [((0,), (0,)), ((3,), (2,)), ((2, 2), (2, 2)), ((), ())]
)
def test_plots_refuse_other_shapes(matches, loss):
    with pytest.raises(ValueError, match=r"matches of shape .* must be \(tokens,\)"):
        plot_matches_by_loss(torch.ones(matches), torch.ones(loss))
    if matches != (3,):
        with pytest.raises(ValueError, match=r"matches of shape .* must be \(tokens,\)"):
            plot_matches_per_token(torch.ones(matches))
