"""Examples, tokenizers and batches: knows nothing of models or of reinforcement learning."""

from jaxdyn.data.anagrams import AnagramsConfig
from jaxdyn.data.batching import (
    batch_indices,
    bucket,
    decode_completions,
    encode_prompts,
    encode_supervised,
    epoch_of,
)
from jaxdyn.data.conversations import conversation, conversation_ids
from jaxdyn.data.examples import read_examples
from jaxdyn.data.fit import fit_prompts
from jaxdyn.data.jsonl import JsonlFile
from jaxdyn.data.packing import pack
from jaxdyn.data.pairs import Pairs, fit_pairs
from jaxdyn.data.prompts import Prompts, written
from jaxdyn.data.scored import Scored, read_scored
from jaxdyn.data.source import SETS, DataConfig, DataSet, Example, Source, columns, load_source
from jaxdyn.data.stopping import stop_at_strings
from jaxdyn.data.stories import StoriesConfig
from jaxdyn.data.tokenizer import Tokenizer, character_tokenizer, load_tokenizer
