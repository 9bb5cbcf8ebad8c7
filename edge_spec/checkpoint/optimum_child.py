"""Exports a checkpoint to ONNX by optimum: `python -P optimum_child.py CHECKPOINT FOLDER`.

Runs in an environment that has optimum and not this package. Like `store/pip_child.py` it ends when its parent does,
whose end of the pipe at standard input is never written to. Exit code 3 means that optimum does not know the
architecture; the reason is the last line of standard error.
"""

from __future__ import annotations

import os
import sys
import threading

UNKNOWN = 3


def _end_with(parent: int) -> None:
    while os.read(parent, 1):
        pass
    os._exit(1)


def _main(checkpoint: str, folder: str) -> int:
    threading.Thread(target=_end_with, args=(0,), daemon=True).start()
    from optimum.exporters.onnx import main_export  # type: ignore[import-not-found, unused-ignore]
    from optimum.exporters.tasks import TasksManager  # type: ignore[import-not-found, unused-ignore]
    from transformers import AutoConfig  # type: ignore[import-not-found, unused-ignore]

    task = "text-generation-with-past"
    try:
        model_type = AutoConfig.from_pretrained(checkpoint, local_files_only=True).model_type
        tasks = TasksManager.get_supported_tasks_for_model_type(
            model_type, exporter="onnx", library_name="transformers"
        )
    except (KeyError, ValueError) as exc:
        print(str(exc.args[0] if exc.args else exc).splitlines()[0], file=sys.stderr)
        return UNKNOWN
    if task not in tasks:
        print(f"{model_type} can be exported, but not as a language model with a cache", file=sys.stderr)
        return UNKNOWN
    main_export(
        checkpoint,
        folder,
        task=task,
        framework="pt",
        library_name="transformers",
        local_files_only=True,
        do_validation=False,  # it would load the model twice
        no_post_process=True,
    )
    return 0


if __name__ == "__main__":
    sys.exit(_main(*sys.argv[1:3]))
