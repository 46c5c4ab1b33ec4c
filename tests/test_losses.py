"""The losses against independent implementations: torch's own losses and explicit loops."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from mllm_compress.recovery.losses import (
    COUNTS,
    POSITIONS,
    answer_positions,
    batch_counts,
    canonical_objective,
    hidden_kd,
    logits_kd,
    loss_terms,
    sft,
)
from mllm_compress.study.style import look

G = torch.Generator().manual_seed(0)
B, S, V, H = 3, 7, 11, 5
STUDENT, TEACHER = torch.randn(B, S, V, generator=G), torch.randn(B, S, V, generator=G)
HIDDEN_S, HIDDEN_T = torch.randn(B, S, H, generator=G), torch.randn(B, S, H, generator=G)
LABELS = torch.full((B, S), -100)
LABELS[0, 3:5], LABELS[1, 2:6], LABELS[2, 6] = torch.tensor([4, 2]), torch.tensor([1, 3, 5, 2]), 9


def loop_kl(p_logits, q_logits, temperature):
    "KL(p ‖ q) of two rows of logits, by the definition, in plain Python."
    rows = [[math.exp(x / temperature) for x in row.tolist()] for row in (p_logits, q_logits)]
    p, q = ([x / sum(row) for x in row] for row in rows)
    return sum(a * math.log(a / b) for a, b in zip(p, q))


def state(positions):
    "The tensors that a training step calls the losses with."
    where, targets = answer_positions(LABELS)
    at = where if positions == "answer" else torch.ones(B, S, dtype=torch.bool)
    return {
        "answer_logits": STUDENT[where],
        "targets": targets,
        "student_logits": STUDENT[at],
        "teacher_logits": TEACHER[at],
        "student_hidden": HIDDEN_S[at],
        "teacher_hidden": HIDDEN_T[at],
        "temperature": 2.0,
    }


def terms(losses, positions):
    values = loss_terms(losses, state(positions), batch_counts(LABELS), positions)
    return dict(zip(losses, values.tolist()))


ANSWERS = [(b, t) for b in range(B) for t in range(S - 1) if LABELS[b, t + 1] != -100]
STUDY = ("sft", "logits_kd", "reverse_logits_kd", "hidden_kd")


def test_counts():
    counts = dict(zip(COUNTS, batch_counts(LABELS).tolist()))
    assert counts == {"answers": len(ANSWERS), "positions": B * S, "rows": B} and len(ANSWERS) == 7


def test_per_answer_token():
    found = terms(dict.fromkeys(STUDY, 1.0), "answer")
    log_p = lambda b, t: STUDENT[b, t, LABELS[b, t + 1]] - STUDENT[b, t].exp().sum().log()
    square = lambda b, t: (HIDDEN_S[b, t] - HIDDEN_T[b, t]).square().sum().item() / H
    kl = lambda p, q: sum(loop_kl(p[b, t], q[b, t], 2) for b, t in ANSWERS) / 7
    expected = {
        "sft": sum(-log_p(b, t).item() for b, t in ANSWERS) / 7,
        "logits_kd": 4 * kl(TEACHER, STUDENT),
        "reverse_logits_kd": 4 * kl(STUDENT, TEACHER),
        "hidden_kd": sum(square(b, t) for b, t in ANSWERS) / 7,
    }
    assert found == pytest.approx(expected, rel=1e-5)


def test_the_originals_normalisation_over_all_positions():
    "KL: T² times the sum over all positions, divided by the batch; squared difference: the mean."
    log_s, log_t = (F.log_softmax(x / 2, -1) for x in (STUDENT, TEACHER))
    kl = lambda p, q: F.kl_div(p, q, reduction="sum", log_target=True).item() * 2**2 / B
    expected = {
        "sft": F.cross_entropy(STUDENT[:, :-1].reshape(-1, V), LABELS[:, 1:].reshape(-1)).item(),
        "logits_kd": kl(log_s, log_t),
        "reverse_logits_kd": kl(log_t, log_s),
        "hidden_kd": F.mse_loss(HIDDEN_S, HIDDEN_T).item(),
    }
    assert terms(dict.fromkeys(STUDY, 1.0), "all") == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("positions", POSITIONS)
def test_parts_of_a_batch_add_up_to_the_whole(positions):
    weights, counts, tensors = dict.fromkeys(STUDY, 1.0), batch_counts(LABELS), state(positions)

    def part(half):
        cut = lambda x: x[: len(x) // 2] if half == 0 else x[len(x) // 2 :]
        mine = {name: cut(x) if torch.is_tensor(x) else x for name, x in tensors.items()}
        return loss_terms(weights, mine, counts, positions)

    torch.testing.assert_close(part(0) + part(1), loss_terms(weights, tensors, counts, positions))


def test_an_identical_teacher_costs_nothing_and_pulls_nowhere():
    x = STUDENT[0].clone().requires_grad_()
    for loss in (logits_kd, hidden_kd):
        value = loss(x, x.detach()).sum()
        (gradient,) = torch.autograd.grad(value, x)
        assert value.abs() < 1e-5 and gradient.abs().max() < 1e-6


def test_temperature_squared_keeps_the_gradient():
    "For high temperatures the gradient no longer depends on T (Hinton et al. 2015, eq. 4)."

    def gradient(temperature):
        x = STUDENT[0].clone().requires_grad_()
        return torch.autograd.grad(logits_kd(x, TEACHER[0], temperature).sum(), x)[0]

    torch.testing.assert_close(gradient(1e3), gradient(2e3), rtol=1e-2, atol=1e-4)


def test_half_precision_states_are_compared_in_float32():
    big = torch.full((1, 4), 60_000.0, dtype=torch.float16)
    assert hidden_kd(big, -big).item() == pytest.approx(1.2e5**2, rel=1e-3)
    even = sft(torch.full((1, 4), 6e4, dtype=torch.float16), torch.tensor([2]))
    assert even.item() == pytest.approx(math.log(4), rel=1e-4)


def test_an_objective_has_one_spelling():
    assert canonical_objective("hidden_kd+sft") == "sft+hidden_kd"
    assert canonical_objective("none") == "none"


def test_every_objective_of_the_study_has_a_look_of_its_own():
    names = ["+".join(c) for n in range(1, 5) for c in itertools.combinations(STUDY, n)]
    looks = [look(name) for name in ["none", *names]]
    assert len({(m.color, m.marker, m.line) for m in looks}) == len(looks)
    assert len({m.label for m in looks}) == len(looks)
    assert look("hidden_kd+sft") == look("sft+hidden_kd")
    assert look("hidden_kd+logits_kd+sft").label == "SFT + logits KD + hidden KD"
