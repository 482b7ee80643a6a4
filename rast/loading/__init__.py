"""Turns model sources (folder, hub id, .gguf file) into nets for the core, and reconciles the nets of one transfer."""

from .check import Finding, scan
from .net import LoadedNet, Progress, load_net
from .reconcile import Reconciled, reconcile
from .tokenizer import Tokenizer

__all__ = ["Finding", "LoadedNet", "Progress", "Reconciled", "Tokenizer", "load_net", "reconcile", "scan"]
