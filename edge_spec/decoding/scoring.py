"""How likely a model holds a text to be."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edge_spec.backends.top_k import log_sum_exp
from edge_spec.decoding.session import Session
from edge_spec.errors import UsageError
from edge_spec.types import Hole


def surprisal(
    session: Session, context: Sequence[int], ids: Sequence[int], holes: Sequence[Hole] = ()
) -> NDArray[np.float64]:
    """Minus the log-probability in nats of each of `ids` behind `context` and those before it, float64 [len(ids)].

    exp of the mean is the perplexity. `holes`: what the context has lost. Raises UsageError for an empty context, and
    what `Session.decode` raises.
    """
    if not len(context):
        raise UsageError("the first token of a text has no probability: give a context of at least one token")
    told = np.zeros(len(ids))
    rows = session.spec.max_rows
    for first in range(0, len(ids), rows):
        part = np.array(ids[first : first + rows], np.int64)
        behind = [*context, *ids[: first + len(part) - 1]]
        logits = session.decode(behind, rows=len(part), holes=holes).logits
        told[first : first + len(part)] = log_sum_exp(logits) - logits[np.arange(len(part)), part]
    return told
