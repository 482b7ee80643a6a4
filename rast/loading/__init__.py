"""Turns model sources (folder, hub id, .gguf file) into nets for the core, and reconciles the nets of one transfer."""

from .check import Finding, scan
from .files import is_mapped
from .net import LoadedNet, Progress, load_net
from .quantize import Quantization, quantization_by_role
from .reconcile import Reconciled, reconcile
from .tokenizer import Tokenizer

__all__ = [
    "Finding",
    "LoadedNet",
    "Progress",
    "Quantization",
    "Reconciled",
    "Tokenizer",
    "is_mapped",
    "load_net",
    "quantization_by_role",
    "reconcile",
    "scan",
]
