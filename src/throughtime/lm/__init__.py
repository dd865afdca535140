"""Language models: text in, a trained recurrent model out, and what can be done with it."""

from throughtime.lm.baseline import NGramBaseline
from throughtime.lm.corpus import Corpus, build_corpus, open_corpus
from throughtime.lm.evaluate import Evaluation, evaluate
from throughtime.lm.generate import Sampling, generate
from throughtime.lm.model import LanguageModel, ModelConfig, cell_names
from throughtime.lm.run import Run, open_run
from throughtime.lm.tokenizer import ByteTokenizer, CharTokenizer, Tokenizer, level_names, tokenizer_from_json
from throughtime.lm.train import StepReport, TrainingOptions, TrainingSummary, resume, train

__all__ = [
    "ByteTokenizer",
    "CharTokenizer",
    "Corpus",
    "Evaluation",
    "LanguageModel",
    "ModelConfig",
    "NGramBaseline",
    "Run",
    "Sampling",
    "StepReport",
    "Tokenizer",
    "TrainingOptions",
    "TrainingSummary",
    "build_corpus",
    "cell_names",
    "evaluate",
    "generate",
    "level_names",
    "open_corpus",
    "open_run",
    "resume",
    "tokenizer_from_json",
    "train",
]
