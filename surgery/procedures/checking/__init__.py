"""Checking: what an adapter or a base holds, grades of tensors and of outputs, differences, and their reports."""
