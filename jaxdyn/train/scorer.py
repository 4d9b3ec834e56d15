"""A reward model as a function of texts: written in its own template, read by its own tokenizer.

Sequences are scored in batches of like lengths, the longest first, padded on the right: as many
programs are compiled as there are buckets of lengths. All batches are under way before the first
score is waited for.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from jaxdyn.data import DataConfig, Tokenizer, bucket, conversation, conversation_ids
from jaxdyn.data.batching import cut_left
from jaxdyn.data.messages import Messages
from jaxdyn.distributed import Layout, make_mesh
from jaxdyn.hosts import fetch
from jaxdyn.models import LanguageModel, read_by, sequence_scores, turn_in
from jaxdyn.rewards import LearnedReward
from jaxdyn.sections import MeshConfig
from jaxdyn.types import JaxdynError, Params

jitted_scores = jax.jit(sequence_scores, static_argnums=0)
"""`sequence_scores`, jitted."""


@dataclasses.dataclass(frozen=True)
class Scorer:
    """A reward model with all that it takes to score texts; see `RewardFunction`.

    Attributes:
      name: its section of `reward`.
      data: what it makes of messages (`prompt_template`, `template_date`).
    """

    name: str
    model: LanguageModel
    params: Params
    tokenizer: Tokenizer
    layout: Layout
    options: LearnedReward
    data: DataConfig

    def __call__(
        self, prompts: Sequence[str], completions: Sequence[str], **columns: list
    ) -> list[float | None]:
        """A score for each completion; None for one that is too long, if it is to have none."""
        talks = columns.get("messages") or [None] * len(prompts)
        asked = [p if talk is None else talk for p, talk in zip(prompts, talks, strict=True)]
        return self.score([self.read(p, c) for p, c in zip(asked, completions, strict=True)])

    @property
    def limit(self) -> int:
        """The longest sequence, in tokens."""
        context = self.model.config.max_positions
        return min(self.options.max_length or context, context)

    def read(self, prompt: str | Messages, completion: str) -> list[int]:
        """The tokens of a prompt and its completion up to where the head reads; none for one that
        is too long, if it is to have no score.

        Raises:
          JaxdynError: if it is too long, if that is an error.
        """
        text = conversation(prompt, completion, self.data, self.tokenizer)
        ids = read_by(self.model.config, conversation_ids(self.tokenizer, text))
        if len(ids) <= self.limit:
            return ids
        if self.options.overlong == "error":
            raise JaxdynError(
                f"prompt and completion have {len(ids)} tokens of the reward model's, the limit is "
                f"{self.limit} (max_length); its overlong may be truncate-left or none"
            )
        return [] if self.options.overlong == "none" else cut_left(self.tokenizer, ids, self.limit)

    def score(self, rows: Sequence[list[int]]) -> list[float | None]:
        """The scores of tokenised sequences; None for one without a token."""
        places = [i for i, row in enumerate(rows) if row]
        kept = [rows[i] for i in places]
        scores: list[float | None] = [None] * len(rows)
        found = score_rows(self.model, self.params, self.layout, kept, self.options.batch_size)
        for place, score in zip(places, found.tolist(), strict=True):
            scores[place] = score
        return scores


def score_rows(
    model: LanguageModel,
    params: Params,
    layout: Layout,
    rows: Sequence[list[int]],
    batch_size: int,
) -> Float[np.ndarray, " B"]:
    """The first score of each of B tokenised sequences, at most `batch_size` at a time."""
    gated = model.config.gating is not None
    found = []
    for places, tokens, mask in batches(rows, batch_size, model):
        turns = np.array([turn_in(rows[i]) for i in places], np.int32) if gated else None
        given = layout.rows((tokens, mask, turns))
        found.append((places, jitted_scores(model, params, *given)))
    scores = np.empty(len(rows))
    for places, values in found:
        scores[places] = fetch(values)[:, 0]
    return scores


def batches(
    rows: Sequence[list[int]], batch_size: int, model: LanguageModel
) -> Iterator[tuple[Int[np.ndarray, " R"], Int[np.ndarray, "R T"], Bool[np.ndarray, "R T"]]]:
    """Which rows, and their tokens and mask; the last batch repeats its last row."""
    lengths = np.array([len(row) for row in rows])
    order = np.argsort(-lengths, kind="stable")
    size = -(-bucket(max(len(rows), 1), batch_size) // model.row_shards) * model.row_shards
    for start in range(0, len(rows), size):
        places = order[start : start + size]
        places = np.pad(places, (0, size - len(places)), mode="edge")
        slots = bucket(int(lengths[places[0]]), model.config.max_positions)
        tokens = np.zeros((size, slots), np.int32)
        for row, place in zip(tokens, places, strict=True):
            row[: lengths[place]] = rows[place]
        yield places, tokens, np.arange(slots)[None] < lengths[places][:, None]


def own_layout(layout: Layout) -> Layout:
    """Where this process scores its share: the layout itself, or of many processes the devices
    that are its own, which share the parameters out between them."""
    if jax.process_count() == 1:
        return layout
    mine = [d for d in layout.mesh.devices.flat if d.process_index == jax.process_index()]
    return Layout(make_mesh(MeshConfig(), mine))
