"""A BERT with mean pooling as an ONNX graph of ONNX Runtime's fused operators.

An export of the PyTorch network keeps its dozens of small operators a layer. Written down by hand a
layer is seven, and padding is skipped inside the attention. The graph lives in memory only.
Operators: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

__all__ = ["BertRuntime"]

FUSED = "com.microsoft"
"""The domain of operators that ONNX Runtime adds to the standard's."""


class BertRuntime:
    """Runs a sentence-transformers pipeline that is BERT and mean pooling.

    Raises ValueError where it is anything else.
    """

    def __init__(self, network: Any, threads: int | None = None) -> None:
        kinds = [type(module).__name__ for module in network]
        if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
            raise ValueError(f"the pipeline is {', '.join(kinds)}")
        bert = network[0].auto_model
        config = bert.config
        if config.model_type != "bert" or config.hidden_act != "gelu":
            raise ValueError(f"the network is {config.model_type} with {config.hidden_act}")
        if network[1].get_config_dict().get("pooling_mode") not in ("mean", ("mean",), ["mean"]):
            raise ValueError("the pooling is not the mean")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or 0
        # Threads that spin between two operators burn a core while the engine needs it.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        weights = {name: value.float().numpy() for name, value in bert.state_dict().items()}
        self._session = onnxruntime.InferenceSession(
            _graph(weights, config).SerializeToString(), options, ["CPUExecutionProvider"]
        )
        self._tokenizer = network.tokenizer.backend_tokenizer
        self._max_tokens = int(network.max_seq_length)

    def __call__(self, texts: list[str]) -> NDArray[np.float32]:
        """The mean of the last hidden states, (N, D), not normalised."""
        self._tokenizer.enable_truncation(self._max_tokens)
        self._tokenizer.no_padding()
        rows = [encoding.ids for encoding in self._tokenizer.encode_batch(texts)]
        lengths = np.array([len(row) for row in rows], np.int32)
        ids = np.zeros((len(rows), lengths.max()), np.int32)
        weights = np.zeros((len(rows), 1, lengths.max()), np.float32)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = row
            weights[i, 0, : len(row)] = 1 / len(row)
        feed = {"input_ids": ids, "lengths": lengths, "weights": weights}
        return np.asarray(self._session.run(None, feed)[0][:, 0], np.float32)


def _graph(weights: dict[str, NDArray[np.float32]], config: Any) -> Any:
    nodes: list[Any] = []
    constants: list[Any] = []

    def constant(name: str, value: NDArray[np.float32]) -> str:
        constants.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def weight(name: str) -> str:
        return constant(name, weights[name])

    def node(kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(kind, inputs, [output], **attributes))
        return output

    epsilon = float(config.layer_norm_eps)
    # All tokens are of the first segment, so its embedding can be part of the places'.
    segment = weights["embeddings.token_type_embeddings.weight"][0]
    places = weights["embeddings.position_embeddings.weight"] + segment
    nodes.append(
        helper.make_node(
            "EmbedLayerNormalization",
            [
                "input_ids",
                "",
                weight("embeddings.word_embeddings.weight"),
                constant("places", places),
                "",
                weight("embeddings.LayerNorm.weight"),
                weight("embeddings.LayerNorm.bias"),
            ],
            ["embedded", "unused_mask"],
            domain=FUSED,
            epsilon=epsilon,
        )
    )
    hidden = "embedded"
    for i in range(config.num_hidden_layers):
        layer = f"encoder.layer.{i}"
        heads = [f"{layer}.attention.self.{part}" for part in ("query", "key", "value")]
        attended = node(
            "Attention",
            [
                hidden,
                constant(f"{layer}.qkv", np.hstack([weights[f"{h}.weight"].T for h in heads])),
                constant(f"{layer}.qkv_bias", np.hstack([weights[f"{h}.bias"] for h in heads])),
                "lengths",
            ],
            f"{layer}.attended",
            domain=FUSED,
            num_heads=config.num_attention_heads,
        )
        middle = hidden
        for part, source, activation in (
            ("attention.output", attended, ""),
            ("output", "", "BiasGelu"),
        ):
            if activation:
                dense = f"{layer}.intermediate.dense"
                wide = node(
                    "MatMul",
                    [middle, constant(f"{dense}.T", weights[f"{dense}.weight"].T)],
                    f"{dense}.product",
                )
                source = node(
                    activation, [wide, weight(f"{dense}.bias")], f"{dense}.active", domain=FUSED
                )
            name = f"{layer}.{part}"
            product = node(
                "MatMul",
                [source, constant(f"{name}.T", weights[f"{name}.dense.weight"].T)],
                f"{name}.product",
            )
            middle = node(
                "SkipLayerNormalization",
                [
                    product,
                    middle,
                    weight(f"{name}.LayerNorm.weight"),
                    weight(f"{name}.LayerNorm.bias"),
                    weight(f"{name}.dense.bias"),
                ],
                f"{name}.hidden",
                domain=FUSED,
                epsilon=epsilon,
            )
        hidden = middle
    node("MatMul", ["weights", hidden], "mean")

    def tensor(name: str, kind: int, *shape: str | int) -> Any:
        return helper.make_tensor_value_info(name, kind, shape)

    graph = helper.make_graph(
        nodes,
        "bert",
        [
            tensor("input_ids", TensorProto.INT32, "N", "T"),
            tensor("lengths", TensorProto.INT32, "N"),
            tensor("weights", TensorProto.FLOAT, "N", 1, "T"),
        ],
        [tensor("mean", TensorProto.FLOAT, "N", 1, config.hidden_size)],
        constants,
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid(FUSED, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9)
