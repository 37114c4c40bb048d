"""The engine's arguments."""

from dataclasses import dataclass


@dataclass
class AsyncEngineArgs:
    """A few of them."""

    model: str
    max_num_seqs: int = 256
    max_model_len: int = 40
    enable_prefix_caching: bool = False
    enable_chunked_prefill: bool = True
    enforce_eager: bool = False
    dtype: str = "auto"
    trust_remote_code: bool = True
