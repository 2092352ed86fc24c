"Multiply-accumulates against the formulas"
import pytest, torch, torch.nn.functional as F
from torch import nn
from adverfine.networks.cost import macs

class Attention(nn.Module):
    "4 heads of 5 numbers, 6 queries, 7 keys of `kv_heads` heads"
    def __init__(self, kv_heads=4, **kwargs):
        super().__init__()
        self.kv_heads,self.kwargs = kv_heads,kwargs
    def forward(self, x):
        kv = torch.rand(len(x), self.kv_heads, 7, 5)
        return F.scaled_dot_product_attention(x.view(len(x), 4, 6, 5), kv, kv, **self.kwargs)

@pytest.mark.parametrize('kwargs', [
    dict(), dict(attn_mask=torch.zeros(6, 7)), dict(attn_mask=torch.ones(6, 7).bool()), dict(is_causal=True),
    dict(kv_heads=2, enable_gqa=True)])
def test_attention(kwargs): assert macs(Attention(**kwargs), torch.rand(2, 120))==4*2*6*7*5

@pytest.mark.parametrize('mask', [None, torch.zeros(5, 5), torch.zeros(5, 5).bool()])
def test_encoder_layer(mask):
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer
        def forward(self, x): return self.layer(x, src_mask=mask)
    assert macs(Masked(), torch.rand(3, 5, 8))==5*(4*8*8 + 2*5*8 + 2*8*16)

def test_vit():
    from torchvision.models import vit_b_16
    assert abs(macs(vit_b_16(), torch.rand(1, 3, 224, 224))/1e9-17.6)<.1
