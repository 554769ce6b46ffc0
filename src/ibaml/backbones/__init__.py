"""Frozen feature extractors: any module or function from inputs to features, whose features are computed once.

A backbone stands at the boundary of a learner: inputs become features there, and all that follows sees a table of
numbers. One plain forward pass without gradients is all that is asked of it, so that what ``torch.func`` cannot trace
(recurrent layers, activation checkpointing) works, and running statistics and dropout are in evaluation mode.
"""

from ibaml.backbones.backbone import Backbone
from ibaml.backbones.cache import FeatureCache
from ibaml.backbones.extractor import Extraction, Extractor
from ibaml.backbones.fine_tuned import FineTuned, FineTunedInputs, restore_inputs
from ibaml.backbones.low_rank import low_rank
from ibaml.backbones.named import as_backbone, import_backbone, named_backbone
from ibaml.backbones.outputs import as_features, read_features

__all__ = [
    "Backbone",
    "Extraction",
    "Extractor",
    "FeatureCache",
    "FineTuned",
    "FineTunedInputs",
    "as_backbone",
    "as_features",
    "import_backbone",
    "low_rank",
    "named_backbone",
    "read_features",
    "restore_inputs",
]
