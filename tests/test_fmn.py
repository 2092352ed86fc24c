"Minimum-norm search: against distances that are known, the algorithm of the paper in a loop, and FAB"
import pytest, torch
from math import cos, pi
from torch import Tensor, nn
from fastai.vision.all import Learner, TensorImage, no_random, set_seed
from adverfine.threat import ThreatModel
from adverfine.data.pixels import pixels
from adverfine.data.sources import digits_dls
from adverfine.attacks.attack import value_and_grad
from adverfine.attacks.losses import margin
from adverfine.attacks.scoring import score
from adverfine.attacks.fab import FAB
from adverfine.attacks.fmn import _Shrinking, FMN
import fastai.callback.progress, fastai.callback.schedule  # noqa: F401 verbs of a Learner

def _seed(n=0): return torch.Generator().manual_seed(n)
norms = pytest.mark.parametrize('norm', ['linf', 'l2'])

def _linear(classes, n=16):
    "Planes through the grey image"
    net = nn.Sequential(nn.Flatten(), nn.Linear(n, classes)).double()
    net[1].weight.data = torch.randn(classes, n, generator=_seed(5), dtype=torch.float64)
    net[1].bias.data = -net[1].weight.data.sum(1)/2
    return net

def _exact(net, x, y, norm):
    "Distances from the boundary of a linear network, as if pixels had no range"
    w,z = net[1].weight.detach(),net(x).detach()
    dual = 1 if norm=='linf' else 2
    each = [[(z[i,l]-z[i,k])/(w[k]-w[l]).norm(p=dual) for k in range(len(w)) if k!=l] for i,l in enumerate(y.tolist())]
    return torch.tensor(each).amin(1)

@norms
@pytest.mark.parametrize('classes', [2, 5])
def test_distances_of_a_linear_network_are_exact(norm, classes):
    net,x = _linear(classes),torch.rand(40, 1, 4, 4, generator=_seed(1), dtype=torch.float64)*.2+.4
    y = net(x).argmax(1)
    found,exact = FMN(.01, norm=norm).distances(net, x, y),_exact(net, x, y, norm)
    assert (found>=exact-1e-6).all()
    close = found<=exact*1.01
    assert close.all() if classes==2 else close.float().mean()>.9     # a step climbs towards the runner-up alone

@norms
@pytest.mark.parametrize('clamp', [True, False])
def test_the_search_is_the_algorithm_of_the_paper(norm, clamp):
    "One image at a time, with the norms written out"
    set_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 4)).double()
    net[1].weight.data *= 4
    x = torch.rand(6, 1, 4, 4, generator=_seed(1), dtype=torch.float64)
    y = net(x).argmax(1)
    attack = FMN(.01, steps=12, norm=norm, clamp=clamp)
    length = lambda d: d.abs().max().item() if norm=='linf' else d.square().sum().sqrt().item()
    found = attack.nearest(net, x, y)
    for i in range(6):
        delta,radius,best,nearest = 0*x[i:i+1],float('inf'),None,float('inf')
        for k in range(12):
            alpha,gamma = (a+(b-a)*(1+cos(pi*k/12))/2 for a,b in ((.01, 1), (.001, .05)))
            out,lead,g = value_and_grad(net, x[i:i+1]+delta, y[i:i+1], margin)
            if clamp: g = torch.where((x[i]+delta==0) & (g<0) | (x[i]+delta==1) & (g>0), 0*g, g)
            far,dual = length(delta),g.abs().sum() if norm=='linf' else g.square().sum().sqrt()
            if out.argmax()!=y[i]:
                if far<nearest: best,nearest = x[i:i+1]+delta,far
                radius = min(radius*(1-gamma), nearest)
            elif best is not None: radius = radius*(1+gamma)
            else: radius = far+(1+gamma)*(lead.abs()/dual).item()
            if clamp: radius = min(radius, length(torch.maximum(x[i], 1-x[i])))
            delta = delta+alpha*g/g.square().sum().sqrt()
            if norm=='linf': delta = delta.clamp(-radius, radius)
            else: delta = delta*min(1, radius/length(delta))
            if clamp: delta = (x[i:i+1]+delta).clamp(0, 1)-x[i:i+1]
        assert best is not None
        torch.testing.assert_close(found[i:i+1], best, rtol=1e-4, atol=1e-5)

@pytest.fixture(scope='module')
def digits():
    "Trained in float64, in which every processor comes to the same network"
    dls = digits_dls()
    x,y = (o.as_subclass(Tensor) for o in pixels(dls.train))
    with no_random(1):
        net = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1),
                            nn.ReLU(), nn.Flatten(), nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10)).double()
        opt = torch.optim.Adam(net.parameters(), 2e-3)
        for i in [i for _ in range(8) for i in torch.randperm(len(x), generator=_seed()).split(64)]:
            nn.functional.cross_entropy(net(x[i].double()), y[i]).backward()
            opt.step()
            opt.zero_grad()
    return net.float().eval(),*(o.as_subclass(Tensor)[:150] for o in pixels(dls.valid))

@norms
def test_distances_on_digits_are_those_of_adversarial_images(digits, norm):
    "FAB, with a budget at a time, leaves about as many standing"
    model,x,y = digits
    d,x_adv = FMN(.1, norm=norm).distances(model, x, y),FMN(.1, norm=norm).nearest(model, x, y)
    wrong = model(x).argmax(1)!=y
    assert d.isfinite().all() and (d[wrong]==0).all() and (d[~wrong]>0).all()
    torch.testing.assert_close(d, ThreatModel(1, norm).distance(x_adv, x))
    assert (model(x_adv).argmax(1)!=y).all() and x_adv.min()>=0 and x_adv.max()<=1
    for q in (.3, .6):
        eps = d[~wrong].quantile(q).item()
        fab = score(model, FAB(eps, norm=norm, steps=30), x, y).robust
        assert abs((d>eps).float().mean()-fab)<=.04

@norms
def test_no_distance_is_below_what_is_possible(norm):
    "A linear network on digits: nothing can be nearer than the nearest plane"
    set_seed(0)
    learn = Learner(digits_dls(), nn.Sequential(nn.Flatten(), nn.Linear(64, 10)))
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(12, 5e-2)
    x,y = (o.as_subclass(Tensor) for o in pixels(learn.dls.valid))
    net,x = learn.model.double().eval(),x.double()
    right = net(x).argmax(1)==y
    d,exact = FMN(.1, norm=norm).distances(net, x[right], y[right]),_exact(net, x[right], y[right], norm)
    assert right.float().mean()>.8 and (d>=exact-1e-6).all() and (d/exact).median()<1.3

@norms
def test_as_an_attack_it_stops_inside_the_ball(digits, norm):
    model,x,y = digits
    d = FMN(.1, norm=norm).distances(model, x, y)
    eps,asked = d.median().item(),[]
    attack = FMN(eps, norm=norm)
    def spy(o):
        asked.append(len(o))
        return model(o)
    x_adv = attack(spy, x, y)
    attack.threat.check(x_adv, x)
    fell = model(x_adv).argmax(1)!=y
    assert (fell!=(d<=eps)).float().mean()<=.03 and 0<fell.sum()<len(x)
    assert len(asked)==100 and asked[0]==len(x) and asked[-1]<len(x)*.7
    far = attack.threat.distance(x_adv, x)[~fell]
    torch.testing.assert_close(far, torch.full_like(far, eps), rtol=1e-3, atol=1e-6)   # brought back to its edge

def test_plain_results_whatever_comes_in(digits):
    model,x,y = digits
    x,y = x[:6],y[:6]
    d,x_adv = FMN(.1, steps=5).distances(model, x, y),FMN(.1, steps=5)(model, x, y)
    with torch.inference_mode():
        assert torch.equal(FMN(.1, steps=5).distances(model, x.clone(), y), d)
        assert torch.equal(FMN(.1, steps=5)(model, x.clone(), y), x_adv)
    other = FMN(.1, steps=5).distances(model, TensorImage(x), y)
    assert type(other) is Tensor and torch.equal(other, d) and not d.requires_grad
    model.train()
    assert torch.equal(FMN(.1, steps=5).distances(model, x, y), d) and model.training
    model.eval()
    flat = lambda o: torch.tensor([3., 2, 1]).repeat(len(o), 1)+0*o.flatten(1)[:,:1]
    nothing = FMN(.1, steps=5).distances(flat, x, 0*y)
    assert nothing.isinf().all() and FMN(.1, steps=5)(flat, x, 0*y).isfinite().all()

def test_fields_and_what_they_refuse():
    for kw,why in [(dict(steps=0), 'steps=0'), (dict(steps=1.5), 'steps=1.5'), (dict(norm='l1'), "'linf' or 'l2'"),
            (dict(first_step=0), 'first_step=0'), (dict(gamma=1.), 'gamma=1.0'), (dict(gamma=0), 'gamma=0')]:
        with pytest.raises(ValueError, match=why): FMN(.1, **kw)
    with pytest.raises(ValueError, match='8/255'): FMN(8)
    attack = FMN(.1, steps=7)
    assert attack.name=='FMN' and attack.passes==14 and attack.white_box and not attack.soft
    assert attack.scaled(.5)==FMN(.05, steps=7)

@pytest.mark.parametrize('norm,far', [('linf', .9), ('l2', (.9**2+.7**2+.5**2+.8**2)**.5)])
def test_no_ball_is_larger_than_what_the_range_of_pixels_allows(norm, far):
    x = torch.tensor([.1, .7, .5, .2]).view(1, 1, 2, 2)
    for clamp,furthest in ((True, far), (False, torch.inf)):
        search = _Shrinking(ThreatModel(1, norm, clamp), None, x, torch.zeros(1, dtype=torch.long))
        assert search.furthest.item()==pytest.approx(furthest)

def test_a_step_within_the_ball_stays_as_long_as_it_is():
    x = torch.full((2, 1, 2, 2), .5)
    search = _Shrinking(ThreatModel(1, 'l2'), None, x, torch.zeros(2, dtype=torch.long))
    search.grad,search.radius = torch.tensor([3., 0, 4, 0]).view(1, 1, 2, 2).repeat(2, 1, 1, 1),torch.tensor([.3, .1])
    search.move(.2)
    torch.testing.assert_close((search.adv-x).flatten(1), torch.tensor([[.12, 0, .16, 0], [.06, 0, .08, 0]]))
