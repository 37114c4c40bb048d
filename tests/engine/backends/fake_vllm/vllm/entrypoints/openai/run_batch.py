"""vLLM's run-batch: all requests in, then all answers out, as chats.

With ``VLLM_FAKE_DIES`` naming a file that is not there yet, the process writes half of the answers,
makes that file and kills itself.
"""

import argparse
import json
import os
import signal
from pathlib import Path
from typing import Any

from engine.backends.scripted import alpaca_text


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """One line of the answers."""
    body = request["body"]
    text = alpaca_text(body["messages"][-1]["content"], seed=body["seed"])
    said = {"role": "assistant", "content": text}
    usage = {"prompt_tokens": 100, "completion_tokens": 50, "total_tokens": 150}
    reply = {
        "model": body["model"],
        "choices": [{"index": 0, "message": said, "finish_reason": "stop"}],
        "usage": usage,
    }
    response = {"status_code": 200, "request_id": "r", "body": reply}
    return {"id": "v", "custom_id": request["custom_id"], "response": response, "error": None}


def main() -> None:
    """Answer the file that is given."""
    parser = argparse.ArgumentParser()
    parser.add_argument("-i", type=Path, required=True)
    parser.add_argument("-o", type=Path, required=True)
    parser.add_argument("--model", required=True)
    given, _ = parser.parse_known_args()
    requests = [json.loads(line) for line in given.i.read_text().splitlines()]
    mark = os.environ.get("VLLM_FAKE_DIES")
    dies = mark is not None and not Path(mark).exists()
    if dies:
        requests = requests[: len(requests) // 2]
    given.o.write_text("".join(json.dumps(answer(request)) + "\n" for request in requests))
    if dies:
        Path(str(mark)).touch()
        os.kill(os.getpid(), signal.SIGKILL)


main()
