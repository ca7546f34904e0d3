"""Measuring what a model has learnt: language-model loss now, on any text and by position."""
