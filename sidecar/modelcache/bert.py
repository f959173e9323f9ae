"""BERT models, streamed: the class that Surfing Weights' users know."""

from __future__ import annotations

from typing import Any

from modelcache.streaming import StreamingModel

__all__ = ["StreamingBertModel"]

# Arguments of Surfing Weights' class that mean nothing here.
_SURFING_WEIGHTS = {
    "websocket_uri": 'write address="HOST:9090", which is the weight server\'s gRPC port',
    "config": "pass its values as arguments: address=, cache_size=, prefetch_count=",
    "monitor": "get_inference_stats() has the figures, and the server's /metrics its own",
    "compression": "weights travel as they are stored",
}


class StreamingBertModel(StreamingModel):
    """A BertModel whose layers are read from a weight server while it computes.

    Args:
        model_name: name of the ModelCache, or its repoId.
        cache_size: how many layers stay in memory; None: all.
        auto_class: another BERT class of transformers (BertForMaskedLM, …), with the checkpoint's head.
        model_args: further arguments of StreamingModel and of ``from_pretrained``, such as dtype, add_pooling_layer.

    Example:
        >>> model = StreamingBertModel("bert-base", cache_size=3)
        >>> hidden = model(**tokenizer("Hello", return_tensors="pt")).last_hidden_state
    """

    def __init__(
        self,
        model_name: str = "bert-base",
        cache_size: int | None = 3,
        *,
        auto_class: str | type = "BertModel",
        **model_args: Any,
    ) -> None:
        for name, advice in _SURFING_WEIGHTS.items():
            if name in model_args:
                raise TypeError(f"StreamingBertModel takes no {name}=: {advice}.")
        super().__init__(model_name, auto_class, cache_size=cache_size, **model_args)

    async def forward_async(  # type: ignore[override] # Surfing Weights' users pass these by position
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        token_type_ids: Any = None,
        position_ids: Any = None,
        enable_prefetch: bool = True,  # noqa: FBT001, FBT002 - Surfing Weights' order
        prefetch_count: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Runs the forward pass in a thread, so that the event loop goes on.

        Args:
            input_ids: int64, batch by tokens.
            attention_mask: 1 for tokens, 0 for padding, batch by tokens.
            token_type_ids: int64, batch by tokens.
            position_ids: int64, batch by tokens.
            enable_prefetch: whether layers are read ahead.
            prefetch_count: how many; None: as the model was made with.
            kwargs: of BertModel, such as output_hidden_states.

        Returns:
            BertModel's output: last_hidden_state, batch by tokens by hidden; pooler_output, batch by hidden.
        """
        return await super().forward_async(
            input_ids=input_ids,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
            enable_prefetch=enable_prefetch,
            prefetch_count=prefetch_count,
            **kwargs,
        )
