"""Training, evaluation, prediction and everything a run folder needs."""
