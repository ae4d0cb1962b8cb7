"""AggressiveFocalLoss against its formula: hand-worked values, its limits, and which way alpha pushes."""

import math

import pytest
import torch

from ctclip_model import MOST_GAMMA, AggressiveFocalLoss, create_balanced_loss


def test_hand_worked_value():
    """p = 0.8 on one positive and one negative, alpha = 0.75, gamma = 1, factor 2^2 = 4."""
    logit = math.log(0.8 / 0.2)
    positive = 0.25 * 0.2 * -math.log(0.8)
    negative = 0.75 * 0.8 * -math.log(0.2)
    loss = AggressiveFocalLoss(0.75, 1.0)(torch.tensor([[logit, logit]]), torch.tensor([[1.0, 0.0]]))
    assert loss.item() == pytest.approx(4 * (positive + negative) / 2, rel=1e-6)


@pytest.mark.parametrize(("alpha", "gamma"), [(0.85, 4.0), (0.5, 0.0), (0.1, 1.5), (0.99, 7.0)])
def test_undecided_model_on_balanced_labels_scores_ln_2(alpha, gamma):
    labels = torch.tensor([0.0, 1.0]).repeat(9).expand(4, 18)
    assert AggressiveFocalLoss(alpha, gamma)(torch.zeros(4, 18), labels).item() == pytest.approx(math.log(2), rel=1e-6)


def test_half_half_without_focusing_is_cross_entropy():
    torch.manual_seed(0)
    logits, labels = torch.randn(5, 18), (torch.rand(5, 18) < 0.3).float()
    reference = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels)
    torch.testing.assert_close(AggressiveFocalLoss(0.5, 0.0)(logits, labels), reference)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("gamma", [0.0, 2.0, 4.0])
def test_extreme_logits_give_finite_values_and_gradients(dtype, gamma):
    logits = torch.tensor([100.0, -100.0, 100.0, -100.0], dtype=dtype, requires_grad=True)
    labels = torch.tensor([1.0, 0.0, 0.0, 1.0], dtype=dtype)
    loss = AggressiveFocalLoss(0.85, gamma)(logits, labels)
    loss.backward()
    assert loss.dtype == torch.float32 and torch.isfinite(loss) and torch.isfinite(logits.grad).all()
    expected = 2 ** (gamma + 1) * (0.85 * 100 + 0.15 * 100) / 4  # the two right ones cost nothing
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_the_highest_gamma_gives_finite_values_and_gradients():
    logits = torch.tensor([100.0, -100.0, 0.0, 100.0, -100.0, 0.0], requires_grad=True)
    loss = AggressiveFocalLoss(0.85, MOST_GAMMA)(logits, torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 0.0]))
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(logits.grad).all() and logits.grad.abs().max() > 0


def test_gradient_equals_finite_differences():
    torch.manual_seed(0)
    logits = torch.randn(3, 4, requires_grad=True)
    labels = (torch.rand(3, 4) < 0.5).float()
    criterion = AggressiveFocalLoss(0.7, 2.0)
    criterion(logits, labels).backward()
    step = 1e-3
    for i, j in [(0, 0), (1, 2), (2, 3)]:
        up, down = logits.detach().clone(), logits.detach().clone()
        up[i, j] += step
        down[i, j] -= step
        slope = (criterion(up, labels) - criterion(down, labels)) / (2 * step)
        assert logits.grad[i, j].item() == pytest.approx(slope.item(), rel=2e-2, abs=2e-4)


def _fitted_probability(alpha: float, gamma: float, positives: float = 0.2) -> float:
    """What a constant prediction converges to on labels of which `positives` are 1."""
    logit = torch.zeros(1, requires_grad=True)
    labels = (torch.arange(100) < 100 * positives).float()
    optimizer = torch.optim.LBFGS([logit], max_iter=100)

    def closure():
        optimizer.zero_grad()
        loss = AggressiveFocalLoss(alpha, gamma)(logit.expand(100), labels)
        loss.backward()
        return loss

    optimizer.step(closure)
    return logit.sigmoid().item()


def test_raising_alpha_pushes_predictions_down():
    fitted = [_fitted_probability(alpha, 2.0) for alpha in (0.1, 0.25, 0.5, 0.75, 0.85)]
    assert fitted == sorted(fitted, reverse=True) and fitted[0] - fitted[-1] > 0.2
    assert _fitted_probability(0.5, 0.0) == pytest.approx(0.2, abs=1e-3)  # cross-entropy fits the label rate


def test_bad_values_and_shapes():
    gammas = [(0.5, gamma) for gamma in (-1.0, MOST_GAMMA + 0.5, 1023.0, math.inf, math.nan)]
    for alpha, gamma in [(0.0, 2.0), (1.0, 2.0), (1.5, 2.0), (math.nan, 1.0), *gammas]:
        with pytest.raises(ValueError, match="expected"):
            AggressiveFocalLoss(alpha, gamma)
    with pytest.raises(ValueError, match="differ in shape"):
        create_balanced_loss()(torch.zeros(2, 18), torch.zeros(2, 1))


def test_create_balanced_loss_defaults():
    loss = create_balanced_loss()
    assert isinstance(loss, AggressiveFocalLoss) and (loss.alpha, loss.gamma) == (0.85, 4.0)
