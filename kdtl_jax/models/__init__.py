"""Flax Linen models that return a dict with `"logits"` and their named features.

`kdtl_jax.interop.linen.model(module)` turns one into the library's model functions.
"""

from kdtl_jax.models._cnn import CNN as CNN
from kdtl_jax.models._cnn import cnn as cnn
from kdtl_jax.models._mlp import MLP as MLP
from kdtl_jax.models._mlp import mlp as mlp
from kdtl_jax.models._resnet import ResNet as ResNet
from kdtl_jax.models._resnet import WideResNet as WideResNet
from kdtl_jax.models._resnet import resnet as resnet
from kdtl_jax.models._resnet import resnet_x4 as resnet_x4
from kdtl_jax.models._resnet import wide_resnet as wide_resnet
