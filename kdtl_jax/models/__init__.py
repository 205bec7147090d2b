"""Flax Linen models that return a dict with `"logits"` and named features, and decoders.

`kdtl_jax.interop.linen.model(module)` turns a module into the library's model functions. A text
decoder already consists of functions (`decoder`).
"""

from kdtl_jax.models._blocks import Activation as Activation
from kdtl_jax.models._blocks import gelu as gelu
from kdtl_jax.models._blocks import gelu_tanh as gelu_tanh
from kdtl_jax.models._blocks import mean_pool as mean_pool
from kdtl_jax.models._blocks import quick_gelu as quick_gelu
from kdtl_jax.models._blocks import sentence_embedding as sentence_embedding
from kdtl_jax.models._convnext import ConvNext as ConvNext
from kdtl_jax.models._deberta import Deberta as Deberta
from kdtl_jax.models._decoder import TENSOR_AXES as TENSOR_AXES
from kdtl_jax.models._decoder import Decoder as Decoder
from kdtl_jax.models._decoder import attention_names as attention_names
from kdtl_jax.models._decoder import decoder as decoder
from kdtl_jax.models._decoder import init_cache as init_cache
from kdtl_jax.models._decoder import segment_positions as segment_positions
from kdtl_jax.models._decoder import tap_names as tap_names
from kdtl_jax.models._decoder import unit_names as unit_names
from kdtl_jax.models._decoder_classifiers import text_classifier as text_classifier
from kdtl_jax.models._decoder_classifiers import token_classifier as token_classifier
from kdtl_jax.models._decoder_config import Cache as Cache
from kdtl_jax.models._decoder_config import DecoderConfig as DecoderConfig
from kdtl_jax.models._decoder_config import Norm as Norm
from kdtl_jax.models._decoder_config import Rope as Rope
from kdtl_jax.models._encoders import Bert as Bert
from kdtl_jax.models._named import NAMED_FORMS as NAMED_FORMS
from kdtl_jax.models._named import canonical_name as canonical_name
from kdtl_jax.models._named import depth as depth
from kdtl_jax.models._named import named as named
from kdtl_jax.models._resnets import ImageResNet as ImageResNet
from kdtl_jax.models._resnets import ResNet as ResNet
from kdtl_jax.models._resnets import WideResNet as WideResNet
from kdtl_jax.models._resnets import resnet as resnet
from kdtl_jax.models._resnets import resnet_x4 as resnet_x4
from kdtl_jax.models._resnets import wide_resnet as wide_resnet
from kdtl_jax.models._small_networks import CNN as CNN
from kdtl_jax.models._small_networks import MLP as MLP
from kdtl_jax.models._small_networks import Conv3x3 as Conv3x3
from kdtl_jax.models._small_networks import cnn as cnn
from kdtl_jax.models._small_networks import mlp as mlp
from kdtl_jax.models._text_encoders import ClipText as ClipText
from kdtl_jax.models._text_encoders import ModernBert as ModernBert
from kdtl_jax.models._text_encoders import SiglipText as SiglipText
from kdtl_jax.models._text_encoders import T5Encoder as T5Encoder
from kdtl_jax.models._vit import ClipVision as ClipVision
from kdtl_jax.models._vit import Dinov2 as Dinov2
from kdtl_jax.models._vit import SiglipVision as SiglipVision
from kdtl_jax.models._vit import ViT as ViT
