"""Requantises a GGUF by llama.cpp: `python -P requantize_child.py IN OUT FILE_TYPE PURE THREADS`.

In a process of its own, since llama.cpp cannot be interrupted and may abort. Ends when its parent does, as
`store/pip_child.py`. Standard output gets a line `DONE TOTAL` for each tensor, standard error what llama.cpp complains
of.
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
import threading

_ERROR_LEVEL = 4  # GGML_LOG_LEVEL_ERROR in ggml.h
_TENSOR = re.compile(rb"\[\s*(\d+)/\s*(\d+)\]")


def _end_with(parent: int) -> None:
    while os.read(parent, 1):
        pass
    os._exit(1)


def _main(source: str, out: str, file_type: int, pure: bool, threads: int) -> int:
    threading.Thread(target=_end_with, args=(0,), daemon=True).start()
    import llama_cpp

    def log(level: int, text: bytes, _: object) -> None:
        if level == _ERROR_LEVEL:
            sys.stderr.write(text.decode(errors="replace"))
        elif found := _TENSOR.search(text):
            print(int(found[1]), int(found[2]), flush=True)

    callback = llama_cpp.llama_log_callback(log)
    llama_cpp.llama_log_set(callback, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.pure, params.nthread = file_type, pure, threads
    params.allow_requantize = True
    code = llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(out), ctypes.byref(params))
    return 1 if code else 0


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4] == "1", int(sys.argv[5])))
