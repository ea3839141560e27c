"""Losses, targets, the teacher and monitors against the formulas written out in float64."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

from rsedge.errors import OptionError
from rsedge.training.losses import (
    ExponentialAverage,
    RsdixLoss,
    RsdixSettings,
    contrastive_loss,
    distillation_loss,
    ema_decay,
    in_batch_accuracy,
    sigmoid_loss,
    similarity_mse,
    sinkhorn,
    teacher_targets,
)

PLAIN = RsdixSettings(teacher="none", alpha=1)


def unit(seed: int, rows: int = 5, width: int = 7) -> np.ndarray:
    values = np.random.default_rng(seed).normal(size=(rows, width))
    return values / np.linalg.norm(values, axis=1, keepdims=True)


def tensor(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max(1, keepdims=True))
    return weights / weights.sum(1, keepdims=True)


def plain_sinkhorn(cost, regulariser, iterations):
    q = np.exp(-np.asarray(cost, np.longdouble) / regulariser)
    q /= q.sum()
    m, n = q.shape
    for _ in range(iterations):
        q = q / q.sum(1, keepdims=True) / m
        q = q / q.sum(0, keepdims=True) / n
    return q / q.sum(1, keepdims=True)


def plain_contrastive(image, text, scale):
    logits = scale * image @ text.T
    paired = [np.log(np.diag(softmax(rows))) for rows in (logits, logits.T)]
    return -np.mean(paired)


def plain_targets(image, text, ii_coeff=1.0, tt_coeff=1.0, remove_diag=False, regulariser=0.1, iterations=4):
    diagonal = 100 * np.eye(len(image)) * remove_diag
    ii, tt = ii_coeff * (image @ image.T - diagonal), tt_coeff * (text @ text.T - diagonal)
    images = plain_sinkhorn(-(ii + tt + image @ text.T), regulariser, iterations)
    texts = plain_sinkhorn(-(ii + tt + text @ image.T), regulariser, iterations)
    return images, texts


def plain_distillation(image, text, image_targets, text_targets, t):
    total = 0.0
    for logits, targets in ((image @ text.T, image_targets), (text @ image.T, text_targets)):
        student = softmax(logits * min(max(math.exp(t), 1), 100))
        held = targets > 0
        total += (targets[held] * (np.log(targets[held]) - np.log(student[held]))).sum() / len(image)
    return float(total / 2)


# Contrastive and sigmoid


def test_contrastive_is_the_written_out_loss():
    image, text = unit(0), unit(1)
    found = contrastive_loss(tensor(image), tensor(text), tensor(14.3))
    assert found.item() == pytest.approx(plain_contrastive(image, text, 14.3), rel=1e-12)


def tiny(kind):
    text = {"vocab_size": 40, "max_position_embeddings": 6, "eos_token_id": 39, "bos_token_id": 0, "pad_token_id": 1}
    vision = {"image_size": 8, "patch_size": 4}
    both = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(3)
    if kind == "clip":
        return CLIPModel(CLIPConfig(text_config=text | both, vision_config=vision | both, projection_dim=12)).eval()
    return SiglipModel(SiglipConfig(text_config=text | both, vision_config=vision | both)).eval()


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_the_pair_losses_are_those_of_transformers(kind):
    model = tiny(kind)
    tokens = torch.randint(2, 40, (6, 6), generator=torch.Generator().manual_seed(0))
    pixels = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        model.logit_scale.fill_(1.7)
        out = model(input_ids=tokens, pixel_values=pixels, return_loss=True)
        if kind == "clip":
            found = contrastive_loss(out.image_embeds, out.text_embeds, model.logit_scale.exp())
        else:
            model.logit_bias.fill_(-2.5)
            out = model(input_ids=tokens, pixel_values=pixels, return_loss=True)
            found = sigmoid_loss(out.image_embeds, out.text_embeds, model.logit_scale, model.logit_bias)
    torch.testing.assert_close(found, out.loss.reshape(()), rtol=1e-6, atol=1e-6)


def test_sigmoid_is_the_written_out_loss():
    image, text, t, bias = unit(2), unit(3), 2.1, -4.0
    logits = math.exp(t) * image @ text.T + bias
    signs = 2 * np.eye(5) - 1
    expected = np.log1p(np.exp(-signs * logits)).sum() / 5
    assert sigmoid_loss(tensor(image), tensor(text), tensor(t), tensor(bias)).item() == pytest.approx(expected)


# Sinkhorn and targets


@pytest.mark.parametrize(("rows", "columns"), [(5, 5), (3, 8), (6, 2), (1, 4)])
@pytest.mark.parametrize("iterations", [0, 1, 4])
def test_sinkhorn_is_the_plain_formula(rows, columns, iterations):
    cost = np.random.default_rng(rows).normal(size=(rows, columns))
    found = sinkhorn(tensor(cost), regulariser=0.1, iterations=iterations)
    expected = plain_sinkhorn(cost, 0.1, iterations).astype(float)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-10, atol=1e-300)
    np.testing.assert_allclose(found.sum(1), 1, rtol=1e-12)


def test_sinkhorn_survives_costs_that_overflow_the_plain_formula():
    cost = np.random.default_rng(0).normal(size=(4, 4)) * 120
    with np.errstate(all="ignore"):
        q = np.exp(-cost / 0.1)
        assert not np.isfinite(q / q.sum()).all()  # float64 cannot hold it; extended precision can
    expected = plain_sinkhorn(cost, 0.1, 4).astype(float)
    np.testing.assert_allclose(sinkhorn(tensor(cost)).numpy(), expected, rtol=1e-9, atol=1e-300)
    single = sinkhorn(torch.tensor(cost, dtype=torch.float32))
    assert single.dtype == torch.float32
    np.testing.assert_allclose(single.numpy(), expected, rtol=2e-3, atol=1e-6)


def test_a_row_that_costs_far_more_than_others_keeps_its_plan():
    cost = np.array([[0.0, 1.0], [300.0, 300.5]])  # plain float32 loses the second row: exp(-3000) is 0
    expected = plain_sinkhorn(cost, 0.1, 4).astype(float)
    np.testing.assert_allclose(sinkhorn(torch.tensor(cost, dtype=torch.float32)).numpy(), expected, rtol=1e-3)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ii_coeff": 0.3, "tt_coeff": 1.7},
        {"remove_diag": True},
        {"remove_diag": True, "ii_coeff": 0.5, "tt_coeff": 0.2},
        {"sinkhorn_lambda": 0.05, "iterations": 7},
    ],
)
def test_teacher_targets_are_the_written_out_ones(options):
    image, text = unit(4), unit(5)
    found = teacher_targets(tensor(image).requires_grad_(), tensor(text), **options)
    renamed = {"regulariser" if name == "sinkhorn_lambda" else name: value for name, value in options.items()}
    for target, expected in zip(found, plain_targets(image, text, **renamed), strict=True):
        np.testing.assert_allclose(target.numpy(), expected.astype(float), rtol=1e-9, atol=1e-300)
        assert not target.requires_grad
    if options.get("remove_diag"):
        assert found[0].diagonal().max() < 1e-6


# Distillation


@pytest.mark.parametrize("t", [3.9, -2.0, 6.0])
def test_distillation_is_the_written_out_loss(t):
    image, text = unit(6), unit(7)
    image_targets, text_targets = (part.astype(float) for part in plain_targets(unit(8), unit(9)))
    found = distillation_loss(tensor(image), tensor(text), tensor(image_targets), tensor(text_targets), tensor(t))
    assert found.item() == pytest.approx(plain_distillation(image, text, image_targets, text_targets, t), rel=1e-10)


def test_a_student_that_gives_the_targets_has_no_distillation_loss():
    image, text = tensor(unit(1)), tensor(unit(2))
    scores = image @ text.T * math.exp(1.0)
    targets = scores.softmax(1), scores.T.softmax(1)
    assert distillation_loss(image, text, *targets, tensor(1.0)).item() == pytest.approx(0, abs=1e-12)


# The whole objective


@pytest.mark.parametrize("remove_diag", [False, True])
def test_the_total_is_the_written_out_sum(remove_diag):
    settings = RsdixSettings(alpha=0.3, ii_coeff=0.8, tt_coeff=1.2, remove_diag=remove_diag)
    image, text, teacher_image, teacher_text = (unit(seed) for seed in range(4))
    found = RsdixLoss(settings).double()(*map(tensor, (image, text, 10.0, teacher_image, teacher_text)))
    targets = plain_targets(teacher_image, teacher_text, ii_coeff=0.8, tt_coeff=1.2, remove_diag=remove_diag)
    distilled = plain_distillation(image, text, *(part.astype(float) for part in targets), t=np.float32(3.9))
    expected = 0.3 * plain_contrastive(image, text, 10.0) + 0.7 * distilled
    assert found["distillation"].item() == pytest.approx(distilled, rel=1e-9)
    assert found["loss"].item() == pytest.approx(expected, rel=1e-9)
    assert set(found) == {"loss", "contrastive", "distillation"}


def test_without_a_teacher_it_is_plain_clip():
    image, text = tensor(unit(0)), tensor(unit(1))
    loss = RsdixLoss(PLAIN)
    found = loss(image, text, tensor(12.0))
    assert found["loss"].item() == contrastive_loss(image, text, tensor(12.0)).item()
    assert list(loss.parameters()) == []


def test_the_sigmoid_loss_takes_the_place_of_both():
    image, text = tensor(unit(0)), tensor(unit(1))
    loss = RsdixLoss(RsdixSettings(teacher="none", alpha=1, use_sigmoid_loss=True))
    assert {name: round(value.item(), 6) for name, value in loss.named_parameters()} == {
        "sigmoid_log_temperature": round(math.log(10), 6),
        "sigmoid_bias": -10.0,
    }
    found = loss(image, text, None)
    assert set(found) == {"loss", "sigmoid"}
    found["loss"].backward()
    assert all(value.grad is not None for value in loss.parameters())


def test_the_distillation_learns_its_temperature():
    loss = RsdixLoss(RsdixSettings())
    assert loss.log_temperature.item() == pytest.approx(3.9)
    loss(*map(tensor, (unit(0), unit(1), 10.0, unit(2), unit(3))))["loss"].backward()
    assert loss.log_temperature.grad.abs() > 0


def test_sbert_teaches_through_a_projection_that_learns_by_itself():
    torch.manual_seed(0)
    settings = RsdixSettings(teacher="sbert")
    loss = RsdixLoss(settings, sbert_width=4, width=7).double()
    image, text, scale = (
        tensor(unit(0)).requires_grad_(),
        tensor(unit(1)).requires_grad_(),
        tensor(9.0).requires_grad_(),
    )
    raw = unit(3, width=4) * 3
    found = loss(image, text, scale, tensor(unit(2)), tensor(raw))

    weight, bias = (value.detach().numpy() for value in loss.projection.parameters())
    projected = raw @ weight.T + bias
    projected /= np.linalg.norm(projected, axis=1, keepdims=True)
    targets = [part.astype(float) for part in plain_targets(unit(2), projected)]
    distilled = plain_distillation(unit(0), unit(1), *targets, t=np.float32(3.9))
    own = plain_contrastive(unit(0), projected, 9.0)
    assert found["distillation"].item() == pytest.approx(distilled, rel=1e-9)
    assert found["projection"].item() == pytest.approx(own, rel=1e-9)
    total = 0.5 * plain_contrastive(unit(0), unit(1), 9.0) + 0.5 * distilled + own
    assert found["loss"].item() == pytest.approx(total, rel=1e-9)

    # The student and the scale feel the two specified losses alone, the projection its own alone.
    specified = settings.alpha * found["contrastive"] + (1 - settings.alpha) * found["distillation"]
    students = image, text, scale
    for whole, part in zip(
        torch.autograd.grad(found["loss"], students, retain_graph=True),
        torch.autograd.grad(specified, students, retain_graph=True),
        strict=True,
    ):
        torch.testing.assert_close(whole, part)
    weight_gradient = torch.autograd.grad(found["loss"], loss.projection.weight, retain_graph=True)[0]
    own_gradient = torch.autograd.grad(found["projection"], loss.projection.weight)[0]
    torch.testing.assert_close(weight_gradient, own_gradient)
    assert own_gradient.abs().max() > 0


def test_it_computes_in_float32_under_autocast():
    loss = RsdixLoss(RsdixSettings(teacher="sbert"), sbert_width=4, width=7)
    inputs = [torch.tensor(value).float() for value in (unit(0), unit(1), 20.0, unit(2), unit(3, width=4))]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = loss(*inputs)
    for name, value in loss(*inputs).items():
        assert found[name].dtype == torch.float32
        assert found[name].item() == value.item()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"alpha": 1.5, "sinkhorn_lambda": 0.0, "iterations": -1}, ["alpha is 1.5", "sinkhorn_lambda is 0.0", "-1"]),
        ({"alpha": math.nan}, ["alpha is nan"]),
        ({"ii_coeff": math.inf}, ["ii_coeff is inf"]),
        ({"teacher": "bert"}, ["'bert'", "none, ema, sbert"]),
        ({"teacher": "none"}, ["alpha is 0.5", "set alpha 1"]),
        ({"alpha": 1}, ["nothing is learnt from teacher 'ema'"]),
        ({"alpha": 1, "teacher": "none", "remove_diag": True}, ["remove_diag only shape"]),
        ({"use_sigmoid_loss": True}, ["use_sigmoid_loss takes the place", "teacher is 'ema'"]),
    ],
)
def test_settings_refuse_what_is_wrong_or_would_do_nothing(values, words):
    with pytest.raises(OptionError) as error:
        RsdixSettings(**values)
    assert [word for word in words if word not in str(error.value)] == []


def test_the_loss_refuses_inputs_it_lacks_or_cannot_use():
    image, text, scale = torch.eye(3), torch.eye(3), torch.tensor(1.0)
    with pytest.raises(ValueError, match="teacher is 'ema'"):
        RsdixLoss(RsdixSettings())(image, text, scale)
    with pytest.raises(ValueError, match="teacher is 'none'"):
        RsdixLoss(PLAIN)(image, text, scale, image, text)
    with pytest.raises(ValueError, match="logit_scale"):
        RsdixLoss(PLAIN)(image, text, None)
    with pytest.raises(OptionError, match="give both widths"):
        RsdixLoss(RsdixSettings(teacher="sbert"))
    with pytest.raises(OptionError, match="neither for another"):
        RsdixLoss(RsdixSettings(), sbert_width=4, width=4)


# The moving average


def small_module() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))


def test_the_decay_warms_up():
    assert ema_decay(1) == 2 / 11
    assert ema_decay(100) == 101 / 110
    assert ema_decay(10**6) == 0.999
    assert ema_decay(3, 0.2) == 0.2


def test_the_average_is_the_written_out_one():
    module = small_module()
    average = ExponentialAverage(module, decay=0.7)
    expected = {name: value.detach().double().numpy() for name, value in module.named_parameters()}
    for step in range(1, 30):
        module(torch.randn(8, 3))  # batch norm changes its buffers
        with torch.no_grad():
            for value in module.parameters():
                value.add_(torch.randn_like(value))
        average.update(module)
        kept = min(0.7, (1 + step) / (10 + step))
        for name, value in module.named_parameters():
            expected[name] = kept * expected[name] + (1 - kept) * value.detach().double().numpy()
    for name, value in average.module.named_parameters():
        np.testing.assert_allclose(value.numpy(), expected[name], rtol=1e-5, atol=1e-6)
        assert not value.requires_grad
    for kept, buffer in zip(average.module.buffers(), module.buffers(), strict=True):
        torch.testing.assert_close(kept, buffer)


def test_the_average_stays_in_float32_and_in_evaluation_mode():
    module = small_module().to(torch.bfloat16)
    average = ExponentialAverage(module)
    average.train()
    assert {value.dtype for value in average.module.parameters()} == {torch.float32}
    assert not any(part.training for part in average.modules())
    average.update(module)
    inputs = torch.randn(2, 3)
    torch.testing.assert_close(average(inputs), average.module(inputs))


def test_a_loaded_average_goes_on_as_if_it_had_not_stopped():
    module = small_module()
    first = ExponentialAverage(module)
    for _ in range(3):
        first.update(module)
    second = ExponentialAverage(small_module())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert second.steps.item() == 3
    with torch.no_grad():
        module[0].weight.add_(1)
    for average in (first, second):
        average.update(module)
    for name, value in first.state_dict().items():
        assert torch.equal(second.state_dict()[name], value), name


def test_a_decay_outside_its_range_is_refused():
    with pytest.raises(OptionError, match=r"decay is 1\.5"):
        ExponentialAverage(nn.Linear(1, 1), decay=1.5)


# Monitors


def test_accuracy_counts_both_directions():
    image = torch.eye(4)
    text = torch.eye(4)[[0, 1, 3, 2]]
    assert in_batch_accuracy(image, image).item() == 1
    assert in_batch_accuracy(image, text).item() == 0.5
    lopsided = torch.tensor([[1.0, 0.0], [0.9, 0.1]])  # both texts like image 0 best, each image its own text
    assert in_batch_accuracy(torch.eye(2), lopsided).item() == 0.75


def test_similarity_mse_is_the_written_out_mean():
    image, text, sbert = unit(0) * 3, unit(1) * 0.2, unit(2, width=4) * 5

    def cosine(a, b):
        return a @ b.T / np.linalg.norm(a, axis=1)[:, None] / np.linalg.norm(b, axis=1)

    wanted = cosine(sbert, sbert)
    errors = [((cosine(*pair) - wanted) ** 2).mean() for pair in ((image, image), (image, text), (text, text))]
    found = similarity_mse(*map(tensor, (image, text, sbert)))
    assert found.item() == pytest.approx(np.mean(errors), rel=1e-10)
