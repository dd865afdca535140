"""Language models that are read step by step by a stream (`throughtime.stream`), where one can."""

import torch

from throughtime.kernels import native
from throughtime.lm.fixed_window import FixedWindow
from throughtime.lm.model import LanguageModel
from throughtime.streaming import Stream, stream


def stream_of(model: LanguageModel, precision: str = "float32", streams: int = 1) -> Stream | None:
    """Return a stream of a model as it is now; `None` where the model itself is to be called.

    That is one on a GPU, a fixed window, weights that aren't float32, something that only looks like a language model, or an
    installation without kernels. A precision other than float32 is insisted on.

    Raises:
        InputError: There can be no stream of that precision.
    """
    if precision == "float32" and not _has_stream(model):
        return None
    return stream(model, streams=streams, precision=precision)


def _has_stream(model: LanguageModel) -> bool:
    if native.module is None or type(model) is not LanguageModel or isinstance(model.recurrent, FixedWindow):
        return False
    has_hooks = any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    return not has_hooks and all(p.dtype == torch.float32 and p.is_cpu for p in model.parameters())
