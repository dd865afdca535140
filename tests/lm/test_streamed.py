"""Language models as streams."""

import pytest
import torch

import throughtime
from throughtime.kernels import native
from throughtime.lm import LanguageModel, ModelConfig

pytestmark = pytest.mark.skipif(native.module is None, reason="streams need the kernels")

CONFIGS = {
    "one-hot": {"hidden_size": 33},
    "embedded": {"hidden_size": 33, "embedding_size": 12, "cell": "gru", "num_layers": 2, "dropout": 0.2},
    "tied": {"hidden_size": 33, "embedding_size": 12, "tied": True},
    "locked": {"hidden_size": 20, "embedding_size": 20, "num_layers": 3, "dropout": 0.3, "locked": True, "tied": True},
    "regularised": {
        "hidden_size": 20,
        "layer_norm": True,
        "zoneout": 0.2,
        "weight_drop": 0.3,
        "recurrent_dropout": 0.2,
    },
    "rnn": {"hidden_size": 20, "cell": "rnn", "embedding_size": 7, "embedding_dropout": 0.4},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_language_model_is_streamed_as_it_evaluates(name):
    model = LanguageModel(ModelConfig(vocabulary_size=60, **CONFIGS[name]))
    stream = throughtime.stream(model)  # still in training mode: a stream computes as in eval
    ids = torch.randint(60, (40,))
    model.eval()
    with torch.no_grad():
        expected = model(ids[:, None])[0][:, 0]
    assert torch.allclose(stream.feed(ids), expected, atol=2e-5)


def test_a_fixed_window_is_refused():
    with pytest.raises(throughtime.InputError, match="FixedWindow"):
        throughtime.stream(LanguageModel(ModelConfig(vocabulary_size=60, cell="mlp", hidden_size=8)))
