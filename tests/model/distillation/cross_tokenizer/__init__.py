"""Tests of distillation across tokenizers."""
