"Fused layers of networks that round, and of those without a ReLU"
import copy, warnings
import pytest, torch, torch.nn.functional as F
from torch import nn, Tensor
from adverfine.networks import fused, precision
from adverfine.networks.fused import crafting_network, rounds
from adverfine.networks.modes import evaluating, frozen
from adverfine.networks.precision import bf16_is_fast
from adverfine.networks.zoo import cnn8
from adverfine.data.sources import digits_dls
from adverfine.compression.quantization import QuantBatchNorm2d, QuantConv2d, quantize, QuantLinear

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason='torch without oneDNN')

@pytest.fixture(scope='module')
def x(): return digits_dls(bs=64).valid.one_batch()[0].as_subclass(Tensor)    # always the same ones

def _gradient_of(network, x):
    z = x.clone().requires_grad_()
    with frozen(network): return torch.autograd.grad(network(z).float().logsumexp(1).sum(), z)[0]

def _agree(a, b):
    "The gradients of nearly all images: of a few, one value in a thousand may be rounded to the next code"
    similar = F.cosine_similarity(a.flatten(1), b.flatten(1))[b.flatten(1).any(1)]
    return len(similar)>len(a)/2 and (similar>.999).float().mean()>.9

def _cosine(a, b): return F.cosine_similarity(a.flatten(), b.flatten(), 0).item()

class Block(nn.Module):
    "A small residual network: sums in place, functional and methods' ReLU, SiLU, GELU"
    def __init__(self):
        super().__init__()
        self.stem,self.stem_norm = nn.Conv2d(1, 16, 3, padding=1, bias=False),nn.BatchNorm2d(16)
        self.a,self.na = nn.Conv2d(16, 16, 3, padding=1, bias=False),nn.BatchNorm2d(16)
        self.b,self.nb = nn.Conv2d(16, 16, 3, padding=1, bias=False),nn.BatchNorm2d(16)
        self.c,self.d,self.silu = nn.Conv2d(16, 16, 3, stride=2),nn.Conv2d(16, 16, 1),nn.SiLU()
        self.e,self.head = nn.Conv2d(16, 16, 1),nn.Linear(16, 10)
    def forward(self, x):
        x = F.relu(self.stem_norm(self.stem(x)))
        out = self.nb(self.b(self.na(self.a(x)).relu()))
        out += x
        out = self.silu(self.c(F.relu(out)))
        out = F.gelu(self.d(out)) + self.e(out).relu_()
        return self.head(out.mean((2,3)))

def _block(x):
    torch.manual_seed(0)
    net = Block()
    for _ in range(20): net(x)      # statistics that mean something
    return net

def _cnn8(x):
    "Its biases are not zero: sums of few bits would be, and at the kink of a ReLU any gradient is right"
    net = cnn8(size=8)
    for m in net:
        if hasattr(m, 'bias'): nn.init.normal_(m.bias, std=.1)
    return net

def _fused_and_silent(net, x, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        fast = crafting_network(net, x[:2], **kwargs)
    assert fast is not None
    return fast

@pytest.mark.parametrize('bits', [8, 4, 2, 1])
@pytest.mark.parametrize('make', [_cnn8, _block])
def test_gradients_of_networks_that_round(bits, make, x):
    torch.manual_seed(0)
    net = make(x)
    assert not rounds(net)
    quantize(net, bits, [x])
    kinds = [type(m) for m in net.modules()]
    assert rounds(net) and (make is not _block or QuantBatchNorm2d in kinds)
    fast = _fused_and_silent(net, x)
    assert len(fast.fused)==kinds.count(QuantConv2d)+kinds.count(QuantLinear)
    right = _gradient_of(net, x)
    assert _agree(_gradient_of(fast, x), right)

    with torch.no_grad():           # weights, statistics and step sizes change, and the fast network is prepared again
        for p in net.parameters(): p.mul_(1+.2*torch.rand_like(p))
        for m in net.modules():
            if isinstance(m, nn.BatchNorm2d): m.running_mean += .1*torch.rand(len(m.running_mean))
            if hasattr(m, 'x_quant'): m.x_quant.log_gain += .3
            if hasattr(m, 'y_quant'): m.y_quant.log_gain += .3
    right,before = _gradient_of(net, x),_gradient_of(fast, x)
    assert not _agree(before, right) and _agree(_gradient_of(fast.prepare(), x), right)
    assert not any(p.grad is not None for p in net.parameters())

def test_no_step_size_and_no_weight_asks_for_a_gradient(x):
    net = cnn8(size=8)
    quantize(net, 4, [x])
    out = crafting_network(net, x[:2])(x)
    assert not out.requires_grad and all(p.requires_grad for p in net.parameters())

def test_gradients_of_a_float_network_of_many_kinds(x):
    net = _block(x)
    fast = _fused_and_silent(net, x)
    assert len(fast.fused)==7 and [m.relu for m in fast.fused]==[True, True, False, False, False, True, False]
    torch.testing.assert_close(_gradient_of(fast, x), _gradient_of(net, x), rtol=1e-4, atol=1e-6)
    seen = []
    for m in fast.fused[:-1]: m.register_forward_hook(lambda m, i, o: seen.append(o))
    fast(x)
    assert all(o.is_contiguous(memory_format=torch.channels_last) for o in seen)

def test_a_layer_called_by_keyword_stays_as_it_is(x):
    class Keyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.a,self.b = nn.Conv2d(1, 4, 3),nn.Conv2d(4, 4, 3)
        def forward(self, x): return F.relu(self.b(input=F.relu(self.a(x)))).mean((2,3))
    net = Keyword()
    fast = _fused_and_silent(net, x)
    assert len(fast.fused)==1
    torch.testing.assert_close(_gradient_of(fast, x), _gradient_of(net, x), rtol=1e-4, atol=1e-6)

def test_a_relu_behind_a_norm_that_rounds_comes_after_the_rounding(x):
    "With one bit and two signs that is something else: nothing is rounded to zero"
    net = _block(x)
    quantize(net, 4, [x], sums=1)
    part = nn.Sequential(net.stem, net.stem_norm, nn.ReLU(), net.b, net.nb, nn.ReLU()).eval()
    assert type(net.nb) is QuantBatchNorm2d
    fast = _fused_and_silent(part, x)
    assert len(fast.fused)==2 and (fast(x)==part(x)).float().mean()>.99

def test_logits_in_bfloat16_are_not_rounded(x):
    net = cnn8(size=8)
    fast = crafting_network(net, x[:2], bf16=True)
    if fast is None: pytest.skip('this processor has no convolutions in bfloat16')
    with torch.no_grad(): logits,right = fast.prepare(bf16=True)(x),net.eval()(x)
    assert logits.dtype==torch.float32 and (logits!=logits.bfloat16().float()).any()
    assert fast.fused[-1].w.dtype==torch.float32 and fast.fused[-2].w.dtype==torch.bfloat16
    assert 0 < (logits-right).abs().max() < .03*right.abs().max()

def test_a_network_that_rounds_in_bfloat16(x):
    net = cnn8(size=8)
    quantize(net, 4, [x])
    fast = crafting_network(net, x[:2], bf16=True)
    if fast is None: pytest.skip('this processor has no convolutions in bfloat16')
    with torch.autocast('cpu', torch.bfloat16): right = _gradient_of(net, x)
    exact = _gradient_of(net, x)
    assert _cosine(_gradient_of(fast.prepare(bf16=True), x), exact) > _cosine(right, exact)-.05

def _wrong_weight(m): return m.w_quant(m.weight)*1.01,m.bias,m.x_quant.constant()
def _unrounded_input(m): return m.w_quant(m.weight),m.bias,None

@pytest.mark.parametrize('wrong', [_wrong_weight, _unrounded_input])
def test_a_layer_that_fuses_wrongly_is_noticed(x, wrong, monkeypatch):
    net = cnn8(size=8)
    quantize(net, 1, [x])
    monkeypatch.setitem(fused.fusable, QuantConv2d, wrong)
    with pytest.warns(UserWarning, match='its fused layers compute something else'):
        assert crafting_network(net, x[:2]) is None

def test_a_graph_that_is_wrong_is_noticed(x, monkeypatch):
    "Each layer is right, but a ReLU gets lost on the way"
    net = _block(x)
    quantize(net, 4, [x])
    real = fused._chain
    def without_relu(node, modules):
        norm,relu,last = real(node, modules)
        return norm,False,last
    monkeypatch.setattr(fused, '_chain', without_relu)
    with pytest.warns(UserWarning, match='its fused layers compute something else'):
        assert crafting_network(net, x[:2]) is None

def test_a_quantizer_stands_still(x):
    net = cnn8(size=8)
    quantize(net, 2, [x])
    q = net[2].x_quant
    rounded,values = q.constant(),torch.rand(500)[None]*4
    with torch.no_grad(): before = q(values)
    with evaluating(net), torch.no_grad(): q.log_gain += 1
    assert torch.equal(rounded(values), before) and not torch.equal(q(values), before)
    values.requires_grad_()
    grads = [torch.autograd.grad(f(values).sum(), values)[0] for f in (q.constant(), q)]
    assert torch.equal(*grads) and 0<grads[0].sum()<=500
    assert not q.constant()(values.detach()).requires_grad

# --- is bfloat16 fast?

@pytest.mark.parametrize('has,speedup,fast', [
    (dict(avx512_bf16=True, amx_tile=False), 0, True), (dict(avx512_bf16=False, amx_tile=True), 0, True),
    (dict(avx512_bf16=False, amx_tile=False), 9, True), (dict(avx512_bf16=False, amx_tile=False), 1.1, False),
    (dict(), 2, True), (dict(sve=True), 1.1, False)])
def test_bf16_is_fast_where_the_processor_says_so(monkeypatch, has, speedup, fast):
    "Timed only where it does not say yes, and once"
    timed = []
    def measure(): return timed.append(1) or speedup
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.setattr(torch.cpu, 'get_capabilities', lambda: has, raising=False)
    monkeypatch.setattr(precision, '_speedup_in_bf16', measure)
    precision._cpu_is_fast_in_bf16.cache_clear()
    assert bf16_is_fast() is fast and bf16_is_fast() is fast
    assert len(timed)==(not any(o for k,o in has.items() if k!='sve'))
    precision._cpu_is_fast_in_bf16.cache_clear()

def test_a_copy_of_a_network_to_craft_on(x):
    net = cnn8(size=8)
    quantize(net, 4, [x])
    fast = crafting_network(net, x[:2])
    assert torch.equal(copy.deepcopy(fast)(x), fast(x))
