"Codes, steps, calibration and the swap, on tensors that can be checked by hand"
import warnings, math, operator
import pytest, torch, torch.nn.functional as F
from torch import nn
from fastai.learner import Learner
from adverfine.networks.zoo import cnn8
from adverfine.data.sources import digits_dls
from adverfine.compression.quantizers import (best_step, calibrations, check_bits, minmax_step, offered_bits,
                                              percentile_step, Quantizer)
from adverfine.compression.quantization import QuantBatchNorm2d, QuantConv2d, quantize, QuantLinear, traced

def _quantizer(bits, step, **kw):
    q = Quantizer(bits, **kw)
    q.begin(torch.tensor(step))
    return q

def test_codes():
    codes = {(b, s, y): (q.lo, q.hi, q.offset) for b in offered_bits for s in (True, False) for y in (True, False)
        for q in [Quantizer(b, s, y)]}
    assert offered_bits==(16, 8, 4, 3, 2, 1)
    for b in (16, 8, 4, 3, 2):
        assert codes[b,True,False]==(-2**(b-1), 2**(b-1)-1, 0) and codes[b,True,True]==(1-2**(b-1), 2**(b-1)-1, 0)
        assert codes[b,False,False]==(0, 2**b-1, 0)
    assert codes[1,True,False]==codes[1,True,True]==(-1, 0, .5) and codes[1,False,False]==(0, 1, 0)
    q = Quantizer(4)
    assert (q.bits, q.signed, q.through, q.step.item(), q.tempering)==(4, True, False, 1, .5)

@pytest.mark.parametrize('bits,kw,x,out', [
    (3, dict(), [-9., -.76, -.74, -.1, .24, .26, .74, 9], [-2., -1, -.5, 0, 0, .5, .5, 1.5]),
    (3, dict(symmetric=True), [-9., 9], [-1.5, 1.5]),
    (2, dict(signed=False), [-1., .2, .3, .7, 9], [0, 0, .5, .5, 1.5]),
    (1, dict(), [-9., -.1, .1, 9], [-.25, -.25, .25, .25]),
    (1, dict(signed=False), [-1., .2, .3, 9], [0, 0, .5, .5])])
def test_rounding(bits, kw, x, out):
    assert _quantizer(bits, .5, **kw)(torch.tensor([x])).tolist()==[out]

def test_gradients_stop_where_values_are_clipped():
    "Codes reach half a step beyond the last one"
    for step in (.5, .25):
        x = torch.tensor([-4.6, -4.4, 0, 3.4, 3.6])*step
        for through,expected in (False, [0, 1, 1, 1, 0]), (True, [1]*5):
            xi = x[None].clone().requires_grad_()
            _quantizer(3, step, through=through)(xi).sum().backward()
            assert xi.grad.tolist()==[expected]
            many = Quantizer(3, through=through)
            many.begin(torch.tensor([[step], [2*step]]))
            xi = torch.stack([x, 2*x]).requires_grad_()
            many(xi).sum().backward()
            assert xi.grad.tolist()==[expected]*2
    xi = (torch.tensor([[-1.1, -.9, .9, 1.1]])).requires_grad_()
    _quantizer(1, 1.)(xi).sum().backward()
    assert xi.grad.tolist()==[[0, 1, 1, 0]]

@pytest.mark.parametrize('shared', [True, False])
def test_gradients_of_steps_are_shared(shared):
    "`(c+o - x/s) s` where a value is inside, `(c+o) s` where it is clipped, over the root of how many share the step"
    torch.manual_seed(0)
    x,grad = torch.randn(6, 20),torch.randn(6, 20)
    q = Quantizer(2, symmetric=not shared)
    step = torch.tensor(.7) if shared else torch.linspace(.3, 1.2, 6)[:,None]
    q.begin(step)
    out = q(x)
    [gain] = torch.autograd.grad(out, q.log_gain, grad)
    c = (x/step).round().clamp(q.lo, q.hi)
    inside = (x/step>=q.lo-.5) & (x/step<=q.hi+.5)
    terms = grad*(c*step-inside*x)
    torch.testing.assert_close(gain, (terms.sum() if shared else terms.sum(1, keepdim=True))/20**.5)
    torch.testing.assert_close(q.step, step)

def test_bits_on_offer():
    assert check_bits(8)==(8, 8) and check_bits((1, 8))==(1, 8)==check_bits([1, 8])
    for bad in (5, 0, True, (8,), (8, 4, 2), (8, 5), (True, 8), (8, True), None, '8'):
        with pytest.raises(ValueError, match='is not offered'): check_bits(bad)
    with pytest.raises(ValueError, match='is not offered'): Quantizer(5)

def test_steps():
    x = torch.stack([torch.linspace(-1, 1, 2001), torch.linspace(0, 3, 2001)])
    q = Quantizer(4)
    torch.testing.assert_close(minmax_step(x, q), torch.tensor([1, 3])/7)
    torch.testing.assert_close(minmax_step(x, Quantizer(1)), torch.tensor([1, 3])/.5)
    torch.testing.assert_close(minmax_step(x*0, q), torch.full((2,), 1e-8/7))
    ranked = torch.arange(1., 2001)[None, torch.randperm(2000, generator=torch.Generator().manual_seed(0))]
    assert percentile_step(ranked, q).item()==pytest.approx(1998/7)
    assert percentile_step(-ranked, q, .5).item()==pytest.approx(1000/7)
    assert percentile_step(ranked, q, 0).item()==pytest.approx(1/7)

@pytest.mark.parametrize('bits', [8, 4, 2, 1])
def test_the_best_of_48_steps(bits):
    torch.manual_seed(0)
    x,q = torch.cat([torch.randn(2, 300), torch.tensor([[4.], [40.]])], 1),Quantizer(bits, symmetric=True)
    tops = x.abs().amax(1)/(q.hi+q.offset)
    for row,top,step in zip(x, tops, best_step(x, q)):
        error = lambda s: (((row/s-q.offset).round().clamp(q.lo, q.hi)+q.offset)*s-row).square().mean()
        tried = [top*10**(-1.7*k/47) for k in range(48)]
        assert any(torch.isclose(step, o, rtol=1e-4) for o in tried) and error(step)<=min(map(error, tried))*(1+1e-4)
    wide = torch.cat([torch.full((1, 2000), 1.), torch.tensor([[50.]])], 1)
    assert best_step(wide, Quantizer(1)).item()==pytest.approx(100*10**-1.7, rel=1e-4)      # the smallest there is
    assert calibrations==dict(mse=best_step, percentile=percentile_step, minmax=minmax_step)

class Sum(nn.Module):
    "conv and norm on two ways, added as it is told; a third norm is read twice"
    def __init__(self, add, affine=True):
        super().__init__()
        self.stem,self.a,self.b = nn.Conv2d(1, 4, 3, padding=1),nn.Conv2d(4, 4, 3, padding=1),nn.Conv2d(4, 4, 1)
        self.na,self.nb,self.twice = nn.BatchNorm2d(4, affine=affine),nn.BatchNorm2d(4),nn.BatchNorm2d(4)
        self.head,self.add = nn.Linear(4, 3),add
    def forward(self, x):
        x = self.stem(x)
        x = self.add(self.na(self.a(x)), self.nb(self.b(x)))
        t = self.twice(x)
        return self.head(F.relu(t+t.relu()).mean((2,3)))

adds = [operator.add, operator.iadd, torch.add, lambda a,b: a.add(b), lambda a,b: a.add_(b)]
def _added(net): return {n for n,m in net.named_modules() if isinstance(m, QuantBatchNorm2d)}

@pytest.mark.parametrize('add', adds)
def test_which_norms_are_rounded(add):
    net,x = Sum(add),torch.rand(4, 1, 5, 5)
    added = quantize(net, 4, [x])
    assert _added(net)=={'na', 'nb'} and net.na.y_quant.bits==8
    assert set(added)=={m.weight for m in net.modules() if hasattr(m, 'w_quant')} | {net.na.weight, net.nb.weight}
    out = net.na(torch.randn(2, 4, 3, 3))
    assert torch.allclose(out/net.na.y_quant.step, (out/net.na.y_quant.step).round(), atol=1e-3)

def test_bits_of_sums():
    x = torch.rand(4, 1, 5, 5)
    for bits,kw,expected in [(4, dict(), 8), ((4, 16), dict(), 16), (4, dict(sums=4), 4), (16, dict(sums=8), 8)]:
        net = Sum(operator.add)
        quantize(net, bits, [x], **kw)
        assert net.na.y_quant.bits==expected
        assert (net.na.y_quant.lo, net.na.y_quant.hi)==(-2**(expected-1), 2**(expected-1)-1)
    net = Sum(operator.add)
    quantize(net, 4, [x], sums=False)
    assert not _added(net)
    with pytest.raises(ValueError, match='bits=5'): quantize(Sum(operator.add), 4, [x], sums=5)
    net = Sum(operator.add, affine=False)
    quantize(net, 4, [x])
    assert _added(net)=={'nb'}
    class Alone(nn.Module):
        def __init__(self):
            super().__init__()
            self.net,self.head = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)),nn.Linear(4, 2)
        def forward(self, x): return self.head((self.net(x)*2).mean((2,3)))
    net = Alone()
    quantize(net, 4, [x])
    assert not _added(net)

def test_calibration_is_from_what_layers_are_fed():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(27, 5)).train()
    batches = [torch.rand(4, 1, 5, 5), 2*torch.rand(4, 1, 5, 5)-.5]
    fed = torch.cat([net[:3](b) for b in batches]).detach()
    weight,w = net[3].weight.detach().clone(),net[0].weight.detach().clone()
    added = quantize(net, (4, 8), batches, calibration='minmax')
    conv,linear = net[0],net[3]
    assert type(conv) is QuantConv2d and type(linear) is QuantLinear and net.training
    assert conv.x_quant.signed and not linear.x_quant.signed and conv.x_quant.through and not linear.x_quant.through
    assert not conv.w_quant.through
    torch.testing.assert_close(linear.x_quant.step, fed.max()/255)
    torch.testing.assert_close(conv.x_quant.step, torch.cat(batches).abs().max()/127)
    torch.testing.assert_close(linear.w_quant.step, (weight.abs().amax(1)/7)[:,None])
    torch.testing.assert_close(conv.w_quant.step, (w.flatten(1).abs().amax(1)/7).view(3, 1, 1, 1))
    assert conv.w_quant.lo==-7 and linear.w_quant.lo==-7
    assert {k: [id(o) for o in v] for k,v in added.items()}=={m.weight: [id(m.w_quant.log_gain),
        id(m.x_quant.log_gain)] for m in (conv, linear)}
    x = batches[0]
    q = lambda v,s,lo,hi: (v/s).round().clamp(lo, hi)*s
    h = F.conv2d(q(x, conv.x_quant.step, -128, 127), q(w, conv.w_quant.step, -7, 7), conv.bias).relu().flatten(1)
    torch.testing.assert_close(net(x), F.linear(q(h, linear.x_quant.step, 0, 255),
        q(weight, linear.w_quant.step, -7, 7), linear.bias))
    assert conv.storage_bytes()==math.ceil(27*4/8)+4*(3+1+3) and linear.storage_bytes()==math.ceil(27*5*4/8)+4*(5+1+5)
    bare = nn.Sequential(nn.Conv2d(1, 1, 3, bias=False), nn.Flatten(), nn.Linear(9, 2))
    quantize(bare, 1, [x])
    assert bare[0].storage_bytes()==2+4*2

def test_large_batches_are_sampled_and_their_largest_value_is_kept():
    net = nn.Sequential(nn.Flatten(), nn.Linear(400, 2))
    x = torch.rand(1000, 1, 20, 20)
    x[500,0,7,7] = 3.
    for calibration in ('minmax', 'mse'):
        quantize(net, 8, [x], calibration=calibration)
        assert net[1].x_quant.step.item()==pytest.approx(3/255, rel=.7 if calibration=='mse' else 1e-5)
    quantize(net, 8, [x.clamp(max=1)], calibration='percentile')
    assert net[1].x_quant.step.item()==pytest.approx(.999/255, rel=1e-3)
    x[0,0,0,0] = -1e-3                       # one negative value is enough
    quantize(net, 8, [x], calibration='minmax')
    assert net[1].x_quant.signed

def test_a_fake_quantized_network_is_given_other_bits():
    x = torch.rand(4, 1, 5, 5)
    net = Sum(operator.add).eval()
    quantize(net, 8, [x])
    gains = {n: p for n,p in net.named_parameters() if 'log_gain' in n}
    for p in gains.values(): p.data.fill_(.3)
    assert quantize(net, 4, [x], sums=16)=={}                      # no new parameters: the old ones go on
    assert {n: id(p) for n,p in net.named_parameters() if 'log_gain' in n}=={n: id(p) for n,p in gains.items()}
    assert all((p==.3).all() for p in gains.values())               # an average of them stays what it was
    assert net.a.w_quant.bits==4 and net.na.y_quant.bits==16 and type(net.a) is QuantConv2d
    fresh = Sum(operator.add).eval()
    fresh.load_state_dict({k: v for k,v in net.state_dict().items() if 'quant' not in k})
    quantize(fresh, 4, [x], sums=16)
    # the float network calibrates, not the rounded one
    def steps(net): return [m.step for m in net.modules() if hasattr(m, 'log_gain')]
    for a,b in zip(steps(net), steps(fresh), strict=True): torch.testing.assert_close(a, b)
    for k,v in net.state_dict().items():
        if 'quant' not in k: torch.testing.assert_close(v, fresh.state_dict()[k])

def test_only_what_runs_is_quantized():
    net = nn.Sequential(nn.Flatten(), nn.Linear(25, 3))
    net[1].spare = nn.Linear(3, 3)
    quantize(net, 8, [torch.rand(4, 1, 5, 5)])
    assert type(net[1].spare) is nn.Linear
    class Own(nn.Conv2d): pass                # a subclass may mean something else by its weights
    net = nn.Sequential(Own(1, 2, 3), nn.Flatten(), nn.Linear(18, 3))
    quantize(net, 8, [torch.rand(4, 1, 5, 5)])
    assert type(net[0]) is Own and type(net[2]) is QuantLinear and net[2].x_quant.through

def test_ends_and_single_layers():
    net,x = cnn8(size=8),torch.rand(4, 1, 8, 8)
    quantize(net, 4, [x], ends=(8, 16), layers={'2': 1, '1?': (2, 3), '13': 8})
    bits = {n: (m.w_quant.bits, m.x_quant.bits) for n,m in net.named_modules() if hasattr(m, 'w_quant')}
    assert bits=={'0': (8, 16), '2': (1, 1), '4': (4, 4), '6': (4, 4), '8': (4, 4), '10': (2, 3), '13': (8, 8),
        '15': (2, 3)}
    for kw,why in [(dict(bits=5), 'bits=5'), (dict(ends=5), 'bits=5'), (dict(layers={'2': 5}), 'bits=5'),
            (dict(layers={'x': 4}), "no layer that runs is called 'x'"),
            (dict(calibration='kl'), 'mse, percentile, minmax'),
                   (dict(batches=[]), 'nothing to calibrate'), (dict(batches=iter([])), 'nothing to calibrate'),
                   (dict(batches=[x/0]), 'NaN or infinite'), (dict(batches=[x.expand(-1, 3, -1, -1)]),
                   'do not go through')]:
        net = cnn8(size=8)
        hooks = lambda: sum(len(m._forward_hooks)+len(m._forward_pre_hooks) for m in net.modules())
        with pytest.raises(ValueError, match=why): quantize(net, **(dict(bits=4, batches=[x]) | kw))
        assert type(net[0]) is nn.Conv2d and not hooks() and net.training

def test_settings_are_looked_at_before_the_images():
    def untouched(): raise AssertionError('calibrated')
    images = (untouched() for _ in range(1))
    for kw in (dict(bits=5), dict(bits=4, ends=5), dict(bits=4, layers={'2': 5}), dict(bits=4, sums=5),
            dict(bits=4, calibration='kl')):
        with pytest.raises(ValueError): quantize(cnn8(size=8), batches=images, **kw)

def test_a_failed_calibration_leaves_the_network_as_it_was():
    net,x = cnn8(size=8),torch.rand(4, 1, 8, 8)
    quantize(net, 4, [x])
    before = net(x)
    with pytest.raises(ValueError, match='NaN or infinite'): quantize(net, 8, [x/0])
    assert type(net[0]) is QuantConv2d and torch.equal(net(x), before)

def test_the_learner_calibrates_on_as_many_batches_as_it_is_told():
    seen = []
    class Watch(nn.Module):
        def forward(self, x): seen.append(len(x)); return x
    learn = Learner(digits_dls(n_train=300, bs=32), nn.Sequential(Watch(), nn.Flatten(), nn.Linear(64, 10)))
    learn.create_opt()
    assert learn.quantize(8) is learn
    for n in (4, 2):
        quantize(learn.model, 8, [torch.rand(4, 1, 8, 8)])
        seen.clear()
        learn.quantize(8, n)
        assert seen.count(32)>=n and sum(o==32 for o in seen) in (n, n+1)
    mine = {id(p) for ps in learn.opt.param_lists for p in ps}
    assert id(learn.model[2].w_quant.log_gain) in mine and id(learn.model[2].x_quant.log_gain) in mine
    with pytest.raises(ValueError, match='bits=5'): learn.quantize(5)

class Forks(nn.Module):
    "Cannot be traced"
    def __init__(self): super().__init__(); self.conv,self.norm = nn.Conv2d(1, 4, 3),nn.BatchNorm2d(4)
    def forward(self, x):
        x = self.norm(self.conv(x))
        return (x if x.sum()>0 else -x).mean((2,3))

def test_what_cannot_be_traced_has_no_graph_and_says_so():
    with pytest.warns(UserWarning, match='cannot trace Forks .*control flow.*so that is left out'):
        assert traced(Forks(), 'that is left out') is None
    with pytest.warns(UserWarning, match='BatchNorms feed into additions stays float32'):
        quantize(Forks(), 8, [torch.rand(4, 1, 8, 8)])
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        quantize(Forks(), 8, [torch.rand(4, 1, 8, 8)], sums=False)       # nothing is left out
        assert traced(nn.Linear(2, 2), '') is None                       # no BatchNorm, nothing to find
    net = Sum(operator.add)
    quantize(net, 8, [torch.rand(4, 1, 5, 5)])
    calls = {n.target for n in traced(net, '').nodes if n.op=='call_module'}
    assert calls=={'stem', 'a', 'b', 'na', 'nb', 'twice', 'head'}         # a quantized layer is one call
