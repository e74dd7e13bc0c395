"""The stages of a step, as its compiled programs and their profiles name them: `with jax.named_scope(scopes.MLP)`."""

EMBED, LOSS, NORM, UPDATE = "embed", "loss", "gradient_norm", "update"
ATTENTION, MLP = "layer/attention", "layer/mlp"
KERNEL, ALL_TO_ALL = "attention_kernel", "all_to_all"
GATHER, SCATTER = "gather", "reduce_scatter"
TO_DEVICE, TO_HOST = "to_device", "to_host"

SCOPES = {
    EMBED: "look-up in the embedding",
    ATTENTION: "norm, projections and rotary embedding of queries, keys and values",
    KERNEL: "the attention kernel",
    ALL_TO_ALL: "the swap of tokens and heads between devices",
    MLP: "output projection, norm and MLP",
    LOSS: "last norm, logits and loss",
    GATHER: "all-gather of a layer's weights",
    SCATTER: "reduce-scatter of a layer's gradients",
    TO_DEVICE: "copies from host memory",
    TO_HOST: "copies to host memory",
    NORM: "norm of all gradients",
    UPDATE: "the optimizer",
}
