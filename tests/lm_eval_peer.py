"""The same requests through lm-eval's two backends: our completions API, and transformers with PEFT in this process.

    python -m tests.lm_eval_peer http://127.0.0.1:8000/v1 reverse mask

Prints one JSON object per function and way of beginning a prompt, with both lists of log-likelihoods. In a process of
its own: lm-eval sets things up globally and warns a lot.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from typing import Any

from serverlesslora.demo import adapter_paths, backbone_path

PAIRS = (
    ("hello world\n", "dlrow olleh"),
    ("hello world\n", "hello world"),
    ("abc", "cba"),
    ("Reply: ", "12 + 3"),
    ("x", "y" * 20),
    ("Grüße aus Köln", "nlöK 🚀"),
)
TEXTS = ("hello there", "a" * 64, "The quick brown fox, 42 times.")


def main() -> None:
    base_url, *functions = sys.argv[1:]
    os.environ["HF_HUB_OFFLINE"] = "1"
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    backbone = str(backbone_path())

    def instances(kind: str, arguments: Any) -> list[Any]:
        return [Instance(request_type=kind, doc={}, arguments=each, idx=i) for i, each in enumerate(arguments)]

    for function, with_bos in itertools.product(functions, (False, True)):
        adapter = adapter_paths().get(function)
        ours: Any = LocalCompletionsAPI(
            base_url=f"{base_url}/completions",
            model=function,
            tokenizer_backend="huggingface",
            tokenizer=backbone,
            num_concurrent=4,
            add_bos_token=with_bos,
        )
        theirs: Any = HFLM(
            pretrained=backbone,
            peft=None if adapter is None else str(adapter),
            dtype="float32",
            device="cpu",
            batch_size=1,
            add_bos_token=with_bos,
        )
        likelihoods = [
            [list(each) for each in model.loglikelihood(instances("loglikelihood", PAIRS))]
            + [[each, None] for each in model.loglikelihood_rolling(instances("loglikelihood_rolling", zip(TEXTS)))]
            for model in (ours, theirs)
        ]
        facts = {"function": function, "with_bos": with_bos}
        print(json.dumps({**facts, "ours": likelihoods[0], "theirs": likelihoods[1]}), flush=True)


if __name__ == "__main__":
    main()
