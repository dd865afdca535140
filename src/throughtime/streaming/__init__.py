"""Streams: a model stepped one input at a time, in microseconds, each stream with a state that is saved, forked and rewound."""

from throughtime.streaming.c_export import Exported, export_c
from throughtime.streaming.engine import Stream, stream
from throughtime.streaming.onnx_export import ExportedOnnx, export_onnx

__all__ = ["Exported", "ExportedOnnx", "Stream", "export_c", "export_onnx", "stream"]
