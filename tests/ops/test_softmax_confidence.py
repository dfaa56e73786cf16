"""Confidence and pseudo-label, by hand."""

from __future__ import annotations

import math

import torch

from co2s_fast.losses import softmax_confidence


def test_by_hand_and_ties_go_to_the_lowest_class():
    logits = torch.tensor([[0.0, math.log(3.0)], [2.0, 2.0], [1.0, 0.0]]).T[None, :, None, :]
    confidence, label = softmax_confidence(logits)
    torch.testing.assert_close(confidence, torch.tensor([[[0.75, 0.5, 1 / (1 + math.exp(-1))]]]))
    assert label.dtype == torch.int64 and label.tolist() == [[[1, 0, 0]]]


def test_between_two_pixels_logits_are_blended_not_probabilities():
    logits = torch.tensor([[[[4.0, 0.0]], [[0.0, 0.0]]]])
    confidence, _ = softmax_confidence(logits, (1, 4))
    expected = torch.sigmoid(torch.tensor([[[4.0, 3.0, 1.0, 0.0]]]))
    torch.testing.assert_close(confidence, expected)
