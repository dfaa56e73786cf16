"""The confusion matrix, by hand."""

from __future__ import annotations

import torch

from co2s_fast.losses import confusion_matrix


def test_rows_are_truth_and_counts_accumulate():
    predicted = torch.tensor([[[0, 0, 1, 2]]])
    logits = torch.nn.functional.one_hot(predicted, 3).permute(0, 3, 1, 2).float()
    truth = torch.tensor([[[0, 1, 1, 255]]])
    found = confusion_matrix(logits, truth)
    assert found.tolist() == [[1, 0, 0], [1, 1, 0], [0, 0, 0]]
    assert confusion_matrix(logits, truth, out=found) is found
    assert found.tolist() == [[2, 0, 0], [2, 2, 0], [0, 0, 0]]
