"""Language models: text in, a trained recurrent model out, and what can be done with it.

A name of this package is imported when it is first used, so that a command waits for no more than it needs.
"""

from typing import TYPE_CHECKING

from throughtime.lazy import on_first_use

if TYPE_CHECKING:
    from throughtime.lm.adaptive import DynamicEvaluation, NeuralCache, evaluate_adaptively
    from throughtime.lm.baseline import NGramBaseline
    from throughtime.lm.bpe import BpeTokenizer, train_bpe
    from throughtime.lm.continuing import options_from
    from throughtime.lm.corpus import Corpus, build_corpus, open_corpus
    from throughtime.lm.encoding import Tokenization
    from throughtime.lm.evaluation import (
        Evaluation,
        PositionLoss,
        SequenceScores,
        evaluate,
        loss_by_position,
        score_sequences,
    )
    from throughtime.lm.generation import Beam, Sampling, beam_search, generate, generate_bytes
    from throughtime.lm.loaded import LoadedRun, Writing, load
    from throughtime.lm.model import LanguageModel, ModelConfig, cell_names
    from throughtime.lm.next_token import next_probabilities, token_names
    from throughtime.lm.packing import pack
    from throughtime.lm.presets import PRESETS, for_minutes
    from throughtime.lm.run import Run, open_run
    from throughtime.lm.score import Hypothesis, rerank, score_lines
    from throughtime.lm.study import Study, Tried, open_study
    from throughtime.lm.tokenizer import ByteTokenizer, CharTokenizer, Tokenizer, level_names, tokenizer_from_json
    from throughtime.lm.training import StepReport, TrainingOptions, TrainingSummary, resume, train
    from throughtime.lm.words import WordTokenizer

__all__ = [
    "PRESETS",
    "Beam",
    "BpeTokenizer",
    "ByteTokenizer",
    "CharTokenizer",
    "Corpus",
    "DynamicEvaluation",
    "Evaluation",
    "Hypothesis",
    "LanguageModel",
    "LoadedRun",
    "ModelConfig",
    "NGramBaseline",
    "NeuralCache",
    "PositionLoss",
    "Run",
    "Sampling",
    "SequenceScores",
    "StepReport",
    "Study",
    "Tokenization",
    "Tokenizer",
    "TrainingOptions",
    "TrainingSummary",
    "Tried",
    "WordTokenizer",
    "Writing",
    "beam_search",
    "build_corpus",
    "cell_names",
    "evaluate",
    "evaluate_adaptively",
    "for_minutes",
    "generate",
    "generate_bytes",
    "level_names",
    "load",
    "loss_by_position",
    "next_probabilities",
    "open_corpus",
    "open_run",
    "open_study",
    "options_from",
    "pack",
    "rerank",
    "resume",
    "score_lines",
    "score_sequences",
    "token_names",
    "tokenizer_from_json",
    "train",
    "train_bpe",
]

_HOMES = {
    "adaptive": ["DynamicEvaluation", "NeuralCache", "evaluate_adaptively"],
    "baseline": ["NGramBaseline"],
    "bpe": ["BpeTokenizer", "train_bpe"],
    "continuing": ["options_from"],
    "corpus": ["Corpus", "build_corpus", "open_corpus"],
    "encoding": ["Tokenization"],
    "evaluation": ["Evaluation", "PositionLoss", "SequenceScores", "evaluate", "loss_by_position", "score_sequences"],
    "generation": ["Beam", "Sampling", "beam_search", "generate", "generate_bytes"],
    "loaded": ["LoadedRun", "Writing", "load"],
    "model": ["LanguageModel", "ModelConfig", "cell_names"],
    "next_token": ["next_probabilities", "token_names"],
    "packing": ["pack"],
    "presets": ["PRESETS", "for_minutes"],
    "run": ["Run", "open_run"],
    "score": ["Hypothesis", "rerank", "score_lines"],
    "study": ["Study", "Tried", "open_study"],
    "tokenizer": ["ByteTokenizer", "CharTokenizer", "Tokenizer", "level_names", "tokenizer_from_json"],
    "training": ["StepReport", "TrainingOptions", "TrainingSummary", "resume", "train"],
    "words": ["WordTokenizer"],
}
__getattr__, __dir__ = on_first_use(__name__, _HOMES)
