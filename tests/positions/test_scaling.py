"""Scaled frequencies and the proportional softmax scale against their definitions."""

from __future__ import annotations

import math

import pytest
import torch

from vdit_fast.positions import frequencies, frequency_aware, interpolated, ntk, proportional_scale, time_aware

WIDTH, THETA, S = 42, 10000.0, 2.5


def close(got, want):
    torch.testing.assert_close(got, want, atol=0, rtol=1e-12)


def test_interpolation_divides_and_ntk_changes_the_base():
    stock = frequencies(WIDTH, THETA)
    close(interpolated(WIDTH, THETA, S), stock / S)
    exponent = torch.arange(0, WIDTH, 2, dtype=torch.float64) / WIDTH
    close(ntk(WIDTH, THETA, S), (THETA * S) ** -exponent)
    assert ntk(WIDTH, THETA, S)[0] == stock[0] == 1


def test_time_aware_at_the_ends_of_time():
    """t = 1: NTK. t = 0: interpolation, but for the first frequency, which no base changes."""
    close(time_aware(WIDTH, THETA, S, 1.0), ntk(WIDTH, THETA, S))
    early = time_aware(WIDTH, THETA, S, 0.0)
    close(early[1:], interpolated(WIDTH, THETA, S)[1:])
    assert early[0] == 1


@pytest.mark.parametrize("t", [0.01, 0.1, 0.37, 0.8])
@pytest.mark.parametrize("head_dim", [None, 128])
def test_time_aware_is_the_papers_formula(t, head_dim):
    d = head_dim or WIDTH
    exponent = torch.arange(0, WIDTH, 2, dtype=torch.float64) / WIDTH
    base = math.log(THETA) + d / ((d - 1) * t + 1) * math.log(S)  # b s^(d / d_t)
    want = torch.maximum((-exponent * base).exp(), THETA**-exponent / S)
    close(time_aware(WIDTH, THETA, S, t, head_dim=head_dim), want)
    later = time_aware(WIDTH, THETA, S, min(t + 0.1, 1), head_dim=head_dim)
    assert (later >= want - 1e-15).all()  # less and less interpolation


def test_watershed_switches():
    for t in (0.0, 0.29):
        assert torch.equal(time_aware(WIDTH, THETA, S, t, watershed=0.3), interpolated(WIDTH, THETA, S))
    for t in (0.3, 1.0):
        assert torch.equal(time_aware(WIDTH, THETA, S, t, watershed=0.3), ntk(WIDTH, THETA, S))


@pytest.mark.parametrize("length", [30, 1024, 5000])
def test_frequency_aware_interpolates_what_training_never_saw_in_full(length):
    stock = frequencies(WIDTH, THETA)
    scaled = frequency_aware(WIDTH, THETA, S, length)
    unseen = 2 * math.pi / stock >= length
    assert unseen.any() and not unseen.all()
    close(scaled[unseen], stock[unseen] / S)
    ratio = stock[~unseen] / scaled[~unseen]
    assert ratio[0] == 1 and (ratio < S).all() and (ratio[1:] > ratio[:-1]).all()
    # s^(e / e*): the logarithm of the slowdown grows with that of the wavelength
    e_star = math.log(length / (2 * math.pi), THETA)
    exponent = torch.arange(0, WIDTH, 2, dtype=torch.float64)[~unseen] / WIDTH
    close(ratio.log(), exponent / e_star * math.log(S))


def test_frequency_aware_with_a_short_axis_is_interpolation():
    close(frequency_aware(WIDTH, THETA, S, 6.0), interpolated(WIDTH, THETA, S))


@pytest.mark.parametrize("width", [0, 2, 42, 128])
def test_factor_one_is_the_stock_table(width):
    stock = frequencies(width, THETA)
    for scaled in (
        interpolated(width, THETA, 1),
        ntk(width, THETA, 1),
        frequency_aware(width, THETA, 1, 500),
        *(time_aware(width, THETA, 1, t, watershed=w) for t in (0.0, 0.4, 1.0) for w in (None, 0.5)),
    ):
        assert torch.equal(scaled, stock)


def test_large_heads_stay_finite():
    assert torch.isfinite(time_aware(1024, THETA, 1000.0, 0.0)).all()


def test_proportional_scale():
    assert proportional_scale(4096, 4096, 72) == pytest.approx(72**-0.5, rel=1e-15)
    assert proportional_scale(4096**2, 4096, 64) == pytest.approx(math.sqrt(2 / 64), rel=1e-15)
    for bad in ((0, 16, 64), (16, 1, 64), (16, 16, 0)):
        with pytest.raises(ValueError, match="trained_length"):
            proportional_scale(*bad)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: interpolated(8, THETA, 0.5), "factor"),
        (lambda: ntk(8, THETA, math.nan), "factor"),
        (lambda: time_aware(8, THETA, 2, 1.5), "t must be"),
        (lambda: time_aware(8, THETA, 2, 0.5, head_dim=0), "head_dim"),
        (lambda: frequency_aware(8, THETA, 2, 0), "length"),
        (lambda: frequency_aware(7, THETA, 2, 9), "width"),
    ],
)
def test_bad_settings_are_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()
