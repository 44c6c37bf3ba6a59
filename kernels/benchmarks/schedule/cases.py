"""temp"""
import dataclasses
import jax, jax.numpy as jnp

@dataclasses.dataclass(frozen=True)
class Case:
    function: object
    arguments: tuple

def splash(length=8192, head_dim=128, block_q=512, block_kv=512, block_kv_compute=512):
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as sk, splash_attention_mask as sm
    L=length
    mask=sm.MultiHeadMask([sm.CausalMask((L,L)) for _ in range(16)])
    k=sk.make_splash_mha_single_device(mask,block_sizes=sk.BlockSizes(block_q=block_q,block_kv=block_kv,block_kv_compute=block_kv_compute))
    a=lambda h:jax.ShapeDtypeStruct((h,L,head_dim),jnp.bfloat16)
    return Case(k,(a(16),a(8),a(8)))
