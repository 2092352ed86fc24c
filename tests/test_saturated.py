"PGD++: temperatures against Jacobians and Hessians in float64; networks of few bits whose softmax is saturated"
import math
from copy import deepcopy
import pytest, torch, torch.nn.functional as F
from torch import Tensor, nn
from fastai.vision.all import Learner, set_seed
from adverfine.networks.zoo import cnn8
from adverfine.data.pixels import pixels
from adverfine.data.sources import digits_dls
from adverfine.attacks.adaptive import Transfer
from adverfine.attacks.apgd import APGD
from adverfine.attacks.gradient import PGD
from adverfine.attacks.saturated import (PGDPlusPlus, curvature, hessian_temperature, jacobian, jacobian_temperature,
                                         unsure_temperature)
from adverfine.attacks.scoring import Asked
from adverfine.attacks.surrogates import Rescaled
import adverfine.compression.quantization, fastai.callback.progress, fastai.callback.schedule  # noqa: F401 verbs

def _seed(n=0): return torch.Generator().manual_seed(n)

def _pieces(scale=1., classes=4):
    "Straight pieces, in float64"
    set_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(9, 12), nn.ReLU(), nn.Linear(12, classes)).double()
    with torch.no_grad():
        for p in net[3].parameters(): p *= scale
    return net

def _images(n=6): return torch.rand(n, 1, 3, 3, generator=_seed(1), dtype=torch.float64)

def test_jacobians_and_their_mean_singular_value():
    net,x = _pieces(),_images()
    jac,values = jacobian(net, x),[]
    for i in range(6):
        by_hand = torch.autograd.functional.jacobian(lambda o: net(o[None])[0], x[i]).flatten(1)
        torch.testing.assert_close(jac[i].double(), by_hand, rtol=1e-5, atol=1e-6)
        values += torch.linalg.eigvalsh(by_hand@by_hand.T).clamp_min(0).sqrt().tolist()
    torch.testing.assert_close(jacobian_temperature(jac).item(), len(values)/sum(values), rtol=1e-5, atol=0)

def test_the_right_class_stays_away_from_certainty():
    "By the formula of the paper, and by what it is for"
    out = torch.tensor([[90., 20, 0, -10], [1, .5, 0, -1], [0, 50, -40, 1], [-9, 0, 8, 60]], dtype=torch.float64)
    y,rho = torch.tensor([0, 0, 1, 0]),.01
    beta = unsure_temperature(out, y, rho)
    for i,(gamma,sure) in enumerate([(100, True), (2, False), (90, True), (69, False)]):
        expected = -math.log(rho/(3*(1-rho)))/gamma if sure else 1
        assert abs(beta[i].item()-expected)<1e-12
    p = (beta[:,None]*out).softmax(1).gather(1, y[:,None])[:,0]
    assert (p[[0, 2]]<=1-rho+1e-9).all()
    worst = torch.tensor([[30., 0, 0, 0]], dtype=torch.float64)           # where the bound is attained
    p = (unsure_temperature(worst, y[:1], rho)*worst).softmax(1)[0,0].item()
    assert abs(p-(1-rho))<1e-9

def test_the_temperature_of_the_largest_hessian():
    "Every number of the grid, with the Hessian by double differentiation"
    net,x = _pieces(30.),_images(24)
    y = net(x).argmax(1)
    found = hessian_temperature(net(x).detach(), y, jacobian(net, x).double())
    for i in range(24):
        top = net(x[i:i+1])[0].topk(2).values.tolist()
        gap,d = top[0]-top[1],4
        low,high = (-math.log(rest/((1-rest)*(d-1)))/gap for rest in (1-1/d-.01, 1e-72))
        norms = []
        for k in range(100):
            beta = low+(high-low)*k/99
            loss = lambda o: F.cross_entropy(beta*net(o[None]), y[i:i+1])
            norms.append(torch.autograd.functional.hessian(loss, x[i]).norm().item())
        k = max(range(100), key=norms.__getitem__)
        assert 0<k<99
        torch.testing.assert_close(found[i].item(), low+(high-low)*k/99, rtol=1e-5, atol=0)
    assert hessian_temperature(net(x).detach(), (y+1)%4, jacobian(net, x).double()).tolist()==[1]*24

@pytest.mark.parametrize('beta', [.3, 1., 4.])
def test_the_norm_of_the_hessian(beta):
    "In float64 by double differentiation, for a temperature in common and one for each image"
    net,x = _pieces(3.),_images()
    out,jac = net(x).detach(),torch.stack([torch.autograd.functional.jacobian(lambda o: net(o[None])[0], o) for o in x])
    gram = jac.flatten(2)@jac.flatten(2).mT
    each = beta*torch.linspace(.5, 2, 6, dtype=torch.float64)
    for betas in each, torch.full((6,), beta, dtype=torch.float64):
        def norm(k):
            def loss(o): return F.cross_entropy(betas[k]*net(o[None]), torch.tensor([0]))
            return torch.autograd.functional.hessian(loss, x[k]).norm()
        torch.testing.assert_close(curvature(out, gram, betas), torch.stack([norm(k) for k in range(6)]))
    torch.testing.assert_close(curvature(out, gram, beta), curvature(out, gram, betas))

@pytest.mark.parametrize('scaling', ['njs', 'hns'])
@pytest.mark.parametrize('classes', [2, 4])
@pytest.mark.parametrize('norm', ['linf', 'l2'])
def test_the_steps_are_those_of_apgd_on_scaled_logits(scaling, classes, norm):
    "The attack once more, with the temperatures by hand; the budget is too small for any image to fall"
    net,x = _pieces(100., classes),_images()
    y,eps = net(x).argmax(1),1e-3
    found = PGDPlusPlus(eps, steps=3, scaling=scaling, norm=norm)(net, x, y, _seed(3))
    start = APGD(eps, norm=norm).start(x, _seed(3))
    assert torch.equal(net(start).argmax(1), y) and torch.equal(net(found).argmax(1), y)
    jac = jacobian(net, start).double()
    if scaling=='njs': first = jacobian_temperature(jac).expand(6)
    else: first = hessian_temperature(net(start).detach(), y, jac)
    def tempered(o):
        out = first.double()[:,None]*net(o)
        return out if scaling=='hns' else out*unsure_temperature(out.detach(), y)[:,None]
    by_hand = APGD(eps, steps=3, loss='pma', norm=norm)(tempered, x, y, _seed(3))
    torch.testing.assert_close(found, by_hand, rtol=1e-5, atol=1e-7)

def test_the_loss_is_the_margin_of_tempered_probabilities():
    out = torch.tensor([[90., 20, 0, -10], [1, .5, 0, -1], [0, 50, -40, 1]], dtype=torch.float64)
    y = torch.tensor([0, 0, 2])
    beta = torch.tensor([1., 2, .1], dtype=torch.float64)
    for rho in .01, .4:
        for scaling,second in ('hns', [1, 1, 1]), ('njs', unsure_temperature(beta[:,None]*out, y, rho).tolist()):
            for k,b in enumerate(beta.tolist()):
                e = [math.exp(b*second[k]*o) for o in out[k].tolist()]
                expected = (max(e[:y[k]]+e[y[k]+1:])-e[y[k]])/sum(e)
                loss = PGDPlusPlus(.1, scaling=scaling, rho=rho).loss(out, y, beta)
                assert abs(loss[k].item()-expected)<1e-12

@pytest.mark.parametrize('scaling', ['njs', 'hns'])
def test_temperatures_stay_with_their_images(scaling):
    "Every second image is wrong from the start and leaves; the others move as if they had been alone"
    net,x = _pieces(100.),_images(12)
    top = net(x).topk(2, 1).indices
    wrong = torch.arange(12)%2==0
    y = torch.where(wrong, top[:,1], top[:,0])
    plus,apgd = PGDPlusPlus(1e-3, scaling=scaling),APGD(1e-3, steps=20)
    beta = torch.linspace(.2, 3, 12)*plus.temperature(net, x, y)
    def climb(i): return apgd.climb(net, x[i], y[i], apgd.start(x, _seed())[i], plus.loss, beta[i])
    together,alone = climb(torch.arange(12)),climb(~wrong)
    torch.testing.assert_close(together[~wrong], alone, rtol=0, atol=1e-9)
    assert torch.equal(net(alone).argmax(1), y[~wrong])

def test_the_jacobian_is_that_of_the_first_hundred_images():
    net,x = _pieces(),_images(130)
    y = net(x).argmax(1)
    beta = PGDPlusPlus(.1).temperature(net, x, y)
    torch.testing.assert_close(beta, jacobian_temperature(jacobian(net, x[:100])).expand(130), rtol=1e-6, atol=0)
    assert not torch.isclose(beta[0], jacobian_temperature(jacobian(net, x)), rtol=1e-6)
    beta = PGDPlusPlus(.1, scaling='hns').temperature(net, x, y)
    torch.testing.assert_close(beta, hessian_temperature(net(x).detach().float(), y, jacobian(net, x)))

@pytest.mark.parametrize('scaling', ['njs', 'hns'])
def test_each_run_starts_anew_for_what_stands(scaling):
    "Three runs find no less than one, each with temperatures of its own start; `passes` are what they take at most"
    net,x = _pieces(100.),_images(40)
    y,starts = net(x).argmax(1),[]
    class Watched(PGDPlusPlus):
        def temperature(self, model, x, y):
            starts.append(x)
            return super().temperature(model, x, y)
    for restarts in 1, 3:
        starts.clear()
        asked = Asked(net)
        x_adv = Watched(1e-3, scaling=scaling, restarts=restarts)(asked, x, y, _seed())
        assert (net(x_adv).argmax(1)==y).all() and len(starts)==restarts
        assert all(not torch.equal(starts[0], o) for o in starts[1:])
        passes = PGDPlusPlus(1e-3, scaling=scaling, restarts=restarts).passes
        assert asked.passes==40*passes

class Large(nn.Module):
    "The same decisions, and a softmax that is 0 or 1"
    def __init__(self, net): super().__init__(); self.net = net
    def forward(self, x): return 1000*self.net(x)

@pytest.fixture(scope='module')
def few_bits():
    "Three networks of 1 bit and three of 2 bits, and 130 images"
    networks = []
    for seed in range(3):
        set_seed(seed)
        parent = Learner(digits_dls(), cnn8(size=8))
        with parent.no_bar(), parent.no_logging(): parent.fit_one_cycle(6, 5e-3)
        for bits in 1, 2:
            learn = Learner(parent.dls, deepcopy(parent.model))
            learn.quantize(bits)
            with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(4, 2e-3)
            networks.append(Large(learn.model).eval())
    return networks,*(o.as_subclass(Tensor) for o in pixels(learn.dls.valid))

@pytest.mark.parametrize('scaling', ['njs', 'hns'])
def test_it_finds_what_the_margin_finds_in_networks_of_few_bits(few_bits, scaling):
    "At equal steps and from the same random starts, over all networks and budgets"
    networks,x,y = few_bits
    fell,tried = dict(pgd=0, plus=0, margin=0),0
    for model in networks:
        right = model(x).argmax(1)==y
        assert right.float().mean()>.7
        for eps in .05, .1:
            scaled = Transfer(APGD(eps, steps=20, loss='margin'), Rescaled(model))
            for k,a in dict(pgd=PGD(eps, steps=20), plus=PGDPlusPlus(eps, scaling=scaling), margin=scaled).items():
                for seed in range(3):
                    x_adv = a(model, x, y, torch.Generator().manual_seed(seed))
                    fell[k] += (right & (model(x_adv).argmax(1)!=y)).sum().item()
            tried += 3*len(x)
    assert fell['plus']>fell['pgd']+.05*tried
    assert fell['plus']>=fell['margin'], fell

def test_fields_and_what_they_refuse():
    net,x = _pieces(),_images()
    y = net(x).argmax(1)
    attack = PGDPlusPlus(.1)
    assert (attack.name, attack.steps, attack.passes, attack.soft, attack.white_box)==('PGD++', 20, 46, False, True)
    assert attack.scaled(.5)==PGDPlusPlus(.05)
    for kw,why in [(dict(scaling='x'), "'njs' or 'hns'"), (dict(rho=0), 'rho=0'), (dict(rho=.5), 'rho=0.5'),
            (dict(steps=0), 'steps=0'), (dict(restarts=0), 'restarts=0'), (dict(norm='l1'), 'not with norm=.l1.')]:
        with pytest.raises(ValueError, match=why): PGDPlusPlus(.1, **kw)
    for bad,labels,why in [(lambda o: net(o).detach(), y, 'gives no gradients'), (lambda o: (net(o),), y, 'not tuple'),
            (lambda o: net(o)[:,:1], 0*y, 'PGD.. needs 2 classes'), (net, F.one_hot(y, 4).float(), 'needs labels')]:
        for scaling in ('njs', 'hns'):
            with pytest.raises(ValueError, match=why): PGDPlusPlus(.1, scaling=scaling)(bad, x, labels)
    flat = lambda o: torch.tensor([3., 2, 1]).repeat(len(o), 1)+0*o.flatten(1)[:,:1]
    for scaling in ('njs', 'hns'):
        attack = PGDPlusPlus(.1, scaling=scaling, restarts=2, norm='l2')
        for model in (net, flat): attack.threat.check(attack(model, x, 0*y), x)
