"""The peer benchmark: its figures, its pipes, and its order of work, on contenders without models."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import peers
import pytest
from peer_bench import llama_cpp_server
from peer_bench.answer import Answer, Settings
from peer_bench.memory import Memory, read_memory
from peer_bench.process import ContenderError, ContenderProcess
from peer_bench.prompts import Prompt, read_workload
from peer_bench.report import compare, disagreements, summarise

SETTINGS = Settings(pair="any", threads=1, n_ctx=64)
A, B = Prompt("a", "code", "first"), Prompt("b", "chat", "second")


def make_answer(num_tokens: int = 11, decode_s: float = 1.0, ttft_s: float = 0.5, **changes: Any) -> Answer:
    whole: dict[str, Any] = {
        "token_ids": list(range(num_tokens)),
        "text": "",
        "prompt_tokens": 5,
        "ttft_s": ttft_s,
        "decode_s": decode_s,
        "wall_s": ttft_s + decode_s,
        "steps": num_tokens - 1,
    }
    return Answer(**(whole | changes))


class TestFigures:
    def test_the_rate_leaves_out_the_first_token_and_sums_before_it_divides(self) -> None:
        figures = summarise({"a": make_answer(11, 1.0), "b": make_answer(31, 9.0)}, [A, B])
        assert figures.tokens_per_s == pytest.approx((10 + 30) / (1 + 9))
        assert figures.generated_tokens == 42

    def test_an_answer_of_one_token_has_no_rate(self) -> None:
        assert summarise({"a": make_answer(1, 0.0)}, [A]).tokens_per_s is None

    def test_tokens_per_step_is_one_plus_the_accepted_of_a_step(self) -> None:
        figures = summarise({"a": make_answer(steps=4, drafted=12, accepted=6)}, [A])
        assert (figures.tokens_per_step, figures.acceptance_rate) == (2.5, 0.5)

    def test_ratios_are_over_the_same_prompts(self) -> None:
        ours = {"a": make_answer(11, 1.0, 1.0), "b": make_answer(11, 1.0, 3.0)}
        theirs = {"a": make_answer(11, 2.0, 1.0), "b": make_answer(11, 8.0, 1.0, token_ids=[9] * 11)}
        ratio = compare(ours, theirs, [A, B])
        assert ratio.tokens_per_s == pytest.approx(10 / 2)
        assert ratio.median == pytest.approx((2 + 8) / 2)
        assert ratio.geometric_mean == pytest.approx(4)
        assert ratio.worst == pytest.approx(2)
        assert ratio.end_to_end == pytest.approx(((2.0 + 1.0) / 2.0 * (8.0 + 1.0) / 4.0) ** 0.5)
        assert ratio.ttft == pytest.approx(2)
        assert (ratio.same_answers, ratio.prompts) == (1, 2)

    def test_unfairness_is_reported(self) -> None:
        answers = {"x": {"a": make_answer()}, "y": {"a": make_answer(prompt_tokens=6, wall_s=2.0)}}
        lengths, outside = disagreements(answers, [A])
        assert "a: the contenders read prompts of different lengths" in lengths
        assert outside.startswith("y spent 0.5 of 2.0 s outside")


class TestWorkload:
    def write(self, tmp_path: Path) -> Path:
        path = tmp_path / "work.jsonl"
        entries = [{"id": f"{task}-{i}", "task": task, "prompt": f"{task} {i}"} for i in range(3) for task in "xy"]
        path.write_text("\n".join(map(json.dumps, entries)) + "\n\n")
        return path

    def test_tasks_and_limit_choose(self, tmp_path: Path) -> None:
        path = self.write(tmp_path)
        assert [prompt.id for prompt in read_workload(path, ["y"], 2)] == ["y-0", "y-1"]
        assert [prompt.id for prompt in read_workload(path, [], 1)] == ["x-0", "y-0"]
        assert len(read_workload(path, [], None)) == 6

    def test_an_unknown_task_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="no prompts of the task z"):
            read_workload(self.write(tmp_path), ["x", "z"], None)

    @pytest.mark.parametrize("line", ["{", "[]", '{"id": 1}', "3"])
    def test_a_broken_line_is_named_by_its_number(self, tmp_path: Path, line: str) -> None:
        path = self.write(tmp_path)
        path.write_text(path.read_text() + line)
        with pytest.raises(ValueError, match="jsonl:8 "):
            read_workload(path, [], None)


WORKER = """
import os, sys
from peer_bench import worker
from peer_bench.answer import Answer

class Scripted:
    about = "scripted"
    def __init__(self, settings):
        if settings.pair == "broken":
            raise RuntimeError("no such model")
        print("chatter on standard output")
    def answer(self, prompt, max_tokens):
        if prompt == "die":
            os._exit(3)
        if prompt == "fail":
            raise ValueError("cannot answer that")
        os.write(1, b"more chatter")
        return Answer(token_ids=[len(prompt), max_tokens], text=prompt, prompt_tokens=1, ttft_s=1, decode_s=1,
                      wall_s=2, steps=1)

worker.CONTENDERS["scripted"] = Scripted
worker.main()
"""


class TestProcess:
    @pytest.fixture(autouse=True)
    def _worker_module(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "scripted_worker.py").write_text(WORKER)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def start(self, pair: str = "any") -> ContenderProcess:
        return ContenderProcess("scripted", Settings(pair=pair, threads=1, n_ctx=8), worker="scripted_worker")

    def test_answers_come_through_whatever_libraries_print(self) -> None:
        process = self.start()
        assert process.about == "scripted"
        assert process.answer("héllo\n", 7).text == "héllo\n"
        assert process.answer("abc", 9).token_ids == [3, 9]
        process.close()

    def test_a_failed_answer_is_an_error_and_the_process_goes_on(self) -> None:
        process = self.start()
        with pytest.raises(ContenderError, match="ValueError: cannot answer that"):
            process.answer("fail", 1)
        assert process.answer("abc", 1).text == "abc"
        process.close()

    def test_a_dead_process_is_an_error(self) -> None:
        process = self.start()
        for _ in range(2):
            with pytest.raises(ContenderError, match="ended"):
                process.answer("die", 1)
        process.close()

    def test_a_failed_load_is_an_error(self) -> None:
        with pytest.raises(ContenderError, match="RuntimeError: no such model"):
            self.start("broken")

    def test_the_process_ends_with_its_input(self) -> None:
        process = self.start()
        process.close()
        assert process._process.returncode == 0

    @pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc")
    def test_memory_is_split_into_anonymous_and_mapped(self) -> None:
        process = self.start()
        process.answer("abc", 1)
        peak = process.peak_answering
        assert 0 < peak.anonymous_bytes < peak.peak_rss_bytes
        assert 0 < peak.mapped_bytes < peak.peak_rss_bytes
        process.close()

    def test_memory_of_a_process_that_is_gone_is_nothing(self) -> None:
        process = self.start()
        process.close()
        assert read_memory(process._process.pid) == Memory()


class FakeProcess:
    """Stands in for `ContenderProcess` and writes down the order of work."""

    log: list[tuple[str, str]]
    peak_loading = peak_answering = Memory(2**20, 2**21, 2**22)
    load_s = 1.0

    def __init__(self, name: str, settings: Settings) -> None:
        self.name = self.about = name

    def answer(self, prompt: str, max_tokens: int) -> Answer:
        if prompt == "bad":
            raise ContenderError(f"{self.name}: bad prompt")
        self.log.append((self.name, prompt))
        return make_answer(decode_s=1.0 if self.name == "ours-pair" else 2.0)

    def close(self) -> None:
        self.log.append((self.name, "close"))


class TestRun:
    @pytest.fixture(autouse=True)
    def log(self, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
        FakeProcess.log = []
        monkeypatch.setattr(peers, "ContenderProcess", FakeProcess)
        monkeypatch.setattr(peers, "_SETTLE_S", 0)
        return FakeProcess.log

    def run(self, tmp_path: Path, *arguments: str, prompts: str) -> int:
        path = tmp_path / "work.jsonl"
        path.write_text("".join(json.dumps({"id": p, "task": "t", "prompt": p}) + "\n" for p in prompts.split()))
        return peers.main(["--workload", str(path), "--contenders", "ours-pair,llama.cpp", *arguments])

    def test_contenders_take_turns_and_each_begins_in_turn(self, tmp_path: Path, log: list[tuple[str, str]]) -> None:
        assert self.run(tmp_path, prompts="p q r") == 0
        work = [(name, prompt) for name, prompt in log if prompt in "pqr"]
        pair, llama = "ours-pair", "llama.cpp"
        assert work == [(pair, "p"), (llama, "p"), (llama, "q"), (pair, "q"), (pair, "r"), (llama, "r")]

    def test_the_first_contender_is_compared_with_the_others(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        self.run(tmp_path, "--json", prompts="p q")
        report = json.loads(capsys.readouterr().out)
        assert report["tasks"]["t"]["ratios"]["ours-pair / llama.cpp"]["median"] == 2.0
        assert report["contenders"]["ours-pair"]["peak_answering"]["anonymous_bytes"] == 2**20
        assert set(report["answers"]["llama.cpp"]) == {"p", "q"}

    def test_the_table_has_a_row_for_each(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.run(tmp_path, prompts="p q")
        out = capsys.readouterr().out
        assert "t: 2 prompts" in out
        assert next(line.split()[1:3] for line in out.splitlines() if line.startswith("ours-pair ")) == [
            "10.0",
            "0.500",
        ]
        assert "llama.cpp" in out

    def test_a_failure_ends_the_run_and_every_process(
        self, tmp_path: Path, log: list[tuple[str, str]], capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert self.run(tmp_path, prompts="p bad") == 1
        assert "bad prompt" in capsys.readouterr().err
        assert log[-2:] == [("llama.cpp", "close"), ("ours-pair", "close")]

    @pytest.mark.parametrize(
        "wrong",
        [["--contenders", "nobody"], ["--contenders", "ours-pair,ours-pair"], ["--limit", "0"], ["--tasks", "z"]],
    )
    def test_bad_usage_is_refused(self, tmp_path: Path, wrong: list[str]) -> None:
        try:
            code = self.run(tmp_path, *wrong, prompts="p q")
        except SystemExit as exc:
            code = int(exc.code or 0)
        assert code == 2


SERVER = """#!{python}
import http.server, json, sys
port = int(sys.argv[sys.argv.index("--port") + 1])
if "-broken" in sys.argv:
    sys.exit(3)
class Handler(http.server.BaseHTTPRequestHandler):
    def reply(self, value):
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def do_GET(self):
        self.reply({{"status": "ok"}})
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.reply({{"asked": asked, "options": sys.argv[1:]}})
    def log_message(self, *_):
        pass
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="the stand-in for the server is a script with a #! line")
def test_the_server_of_llama_cpp_is_waited_for_and_asked_on_loopback(tmp_path: Path) -> None:
    program = tmp_path / "server"
    program.write_text(SERVER.format(python=sys.executable))
    program.chmod(0o755)
    url = llama_cpp_server._start(str(program), ["-m", "x.gguf"], threads=2)
    told = llama_cpp_server._post(f"{url}/completion", {"prompt": [1, 2]})
    assert told["asked"] == {"prompt": [1, 2]}
    assert told["options"][:4] == ["-m", "x.gguf", "-t", "2"]
    with pytest.raises(RuntimeError, match=r"exit code 3"):
        llama_cpp_server._start(str(program), ["-broken"], threads=1)
