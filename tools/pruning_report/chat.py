"""Twenty turns at a quarter of the window: turns that are pruned, against reading the pruned context every turn."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from edge_spec import Engine
from edge_spec.types import Prompt
from pruning_report.texts import fact, filler

TURNS = 20


@dataclass(slots=True)
class ChatReport:
    """Seconds are means over the turns, of the time to the first token."""

    window: int
    whole_tokens: int
    prunings: int
    ttft_s: float
    reread_ttft_s: float
    ratio: float
    answer: str
    full_answer: str
    same_answer: bool


def measure(engine: Engine, *, window: int, padding: int) -> dict[str, object]:
    """`padding`: filler sentences a question. The last question asks for what was said in the turn before it."""
    chat = engine.chat(system="Answer in a few words.")
    chat._window = lambda: window  # one engine serves both windows
    pruned_s, reread_s, prunings, dropped = [], [], 0, 0
    for turn in range(TURNS):
        said, _ = fact(turn)
        question = f"{' '.join(filler(padding, seed=turn))} {said} Say yes if you have noted it."
        if turn == TURNS - 1:
            question = fact(turn - 1)[1].text
        prompt = chat._keeper.ask(question, n_ctx=window, max_tokens=12).prompt
        result = chat.send(question, max_tokens=12, drafter="none")
        pruned_s.append(result.ttft_s)
        gone = sum(part.tokens for part in result.dropped)
        prunings, dropped = prunings + (gone > dropped), gone
        engine.reset()
        again = engine._stream_ids(prompt, max_tokens=1, drafter="none")
        for _ in again:
            pass
        reread_s.append(again.result.ttft_s)
        # The cache gets back what the conversation had left in it; the time of this counts for nobody.
        engine._target.decode([*prompt.ids, *result.token_ids[:-1]])
    messages = [*chat.messages[:-2], {"role": "user", "content": question}]
    whole = engine._source.template.render_ids(messages, engine._source.tokenizer)
    stream = engine._stream_ids(Prompt(whole), max_tokens=12, drafter="none")
    for _ in stream:
        pass
    mean, reread = sum(pruned_s) / TURNS, sum(reread_s) / TURNS
    expected = fact(TURNS - 2)[1].answer
    return asdict(
        ChatReport(
            window=window,
            whole_tokens=len(whole),
            prunings=prunings,
            ttft_s=mean,
            reread_ttft_s=reread,
            ratio=mean / reread,
            answer=result.text,
            full_answer=stream.result.text,
            same_answer=expected in result.text and expected in stream.result.text,
        )
    )
