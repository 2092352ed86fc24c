"""Compress vision models and keep them robust: structured pruning, quantization and adversarial fine-tuning for fastai

Modules:

- `adverfine.all`: What one needs every day, with fastai's vision: `from adverfine.all import *`"""

__version__ = "0.1.0"
