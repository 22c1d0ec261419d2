"""Evaluation: frozen protocols, agreement with the dense model, zero-shot tasks, records and their comparison."""
