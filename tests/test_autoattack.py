"The published algorithms once more, in loops over single images; squares, planes and losses checked by hand"
from functools import partial
import pytest, torch
from torch import nn
from adverfine.threat import ThreatModel
from adverfine.attacks.attack import Attack, cross_entropy, value_and_grad
from adverfine.attacks.losses import dlr, margin, probability_margin, targeted_dlr
from adverfine.attacks.standing import ranked_classes, Standing
from adverfine.attacks.apgd import APGD
from adverfine.attacks.fab import FAB, to_plane
from adverfine.attacks.square import _L2Search, _LinfSearch, _bump, _Draw, Square
from adverfine.attacks.autoattack import AutoAttack

def _seed(n=0): return torch.Generator().manual_seed(n)
norms = pytest.mark.parametrize('norm', ['linf', 'l2'])

class Spy(nn.Module):
    "Keeps every batch it is asked about"
    def __init__(self, net): super().__init__(); self.net,self.seen = net,[]
    def forward(self, x):
        self.seen.append(x.detach().clone())
        return self.net(x)

def _linear(n_out=5, n=4):
    "Planes through the grey image"
    net = nn.Sequential(nn.Flatten(), nn.Linear(n, n_out)).double()
    net[1].weight.data = 3*torch.randn(n_out, n, generator=_seed(5), dtype=torch.float64)
    net[1].bias.data = -net[1].weight.data.sum(1)/2
    return net

# --- losses

out,y = torch.tensor([[4., 1, 3, -2, 0], [2, 7, 6.5, 6, 1]], dtype=torch.float64),torch.tensor([0, 2])

def test_losses():
    torch.testing.assert_close(margin(out, y), torch.tensor([-1., .5]).double())
    torch.testing.assert_close(dlr(out, y), torch.tensor([-1/3, .5/1]).double())
    torch.testing.assert_close(targeted_dlr(out, y, torch.tensor([3, 1])), torch.tensor([-6/(4-.5), .5/(7-4)]).double())
    torch.testing.assert_close(dlr(5*out, y), dlr(out, y))
    flat = torch.zeros(2, 5)
    assert dlr(flat, y).tolist()==[0, 0]==targeted_dlr(flat, y, 1-y.clamp(max=1)).tolist()
    assert dlr(out[:,:3], y).shape==(2,) and targeted_dlr(out[:,:4], y, y).shape==(2,)

def test_losses_of_few_classes():
    "Three classes have no fourth logit to divide by, two have no third"
    three,labels,target = out[:,:3],torch.tensor([0, 2]),torch.tensor([2, 1])
    torch.testing.assert_close(targeted_dlr(three, labels, target), torch.tensor([-1/(4-1), .5/(7-2)]).double())
    torch.testing.assert_close(targeted_dlr(7*three, labels, target), targeted_dlr(three, labels, target))
    two,labels = out[:,:2].clone().requires_grad_(),torch.tensor([0, 0])
    for each in (dlr(two, labels), targeted_dlr(two, labels, 1-labels)):
        torch.testing.assert_close(each, torch.tensor([-3., 5]).double())
        grad, = torch.autograd.grad(each.sum(), two)
        assert grad.tolist()==[[-1, 1], [-1, 1]]
    for refused in (lambda: dlr(out[:,:1], 0*y), lambda: targeted_dlr(out[:,:1], 0*y, 0*y),
            lambda: ranked_classes(lambda x: out[:,:1], torch.rand(2, 1, 2, 2), 0*y, 9)):
        with pytest.raises(ValueError, match="needs 2 classes or more, the model has 1: use a network with one logit"):
            refused()

def test_probability_margin():
    "By hand, and its gradient as two cross-entropies, each weighted by the probability of its class"
    e = out.exp()
    by_hand = torch.stack([(e[0,2]-e[0,0])/e[0].sum(), (e[1,1]-e[1,2])/e[1].sum()])
    torch.testing.assert_close(probability_margin(out, y), by_hand, rtol=1e-12, atol=0)
    z,best = out.clone().requires_grad_(),torch.tensor([2, 1])
    grad, = torch.autograd.grad(probability_margin(z, y).sum(), z)
    p,unit = out.softmax(1),torch.eye(5, dtype=torch.float64)
    expected = torch.stack([p[i,b]*(unit[b]-p[i])-p[i,l]*(unit[l]-p[i]) for i,(b,l) in enumerate(zip(best, y))])
    torch.testing.assert_close(grad, expected, rtol=1e-12, atol=1e-15)

def test_targets_are_the_likeliest_wrong_classes():
    model = lambda x: out
    assert ranked_classes(model, torch.rand(2, 1, 2, 2), y, 2).tolist()==[[2, 1], [1, 3]]
    assert ranked_classes(model, torch.rand(2, 1, 2, 2), y, 9).tolist()==[[2, 1, 4, 3], [1, 3, 0, 4]]
    assert ranked_classes(lambda x: out[:,:3], torch.rand(2, 1, 2, 2), y, 9).tolist()==[[2, 1], [1, 0]]
    assert ranked_classes(lambda x: out[:,:2], torch.rand(2, 1, 2, 2), y%2, 9).tolist()==[[1], [1]]

def test_standing_images():
    x = torch.arange(20.).view(20, 1, 1, 1)
    s = Standing(None, x, torch.zeros(20, dtype=torch.long))
    s.extra,s.scalar,s.other = torch.arange(20),torch.tensor(3.),torch.arange(3)
    s.fell(x+100, torch.arange(20)==4)
    assert s.compact() and len(s.x)==20                            # less than a tenth
    s.fell(x+200, (torch.arange(20)==4) | (torch.arange(20)==7))    # who fell stays as he fell
    assert s.compact()
    assert s.x.flatten().tolist()==[o for o in range(20) if o not in (4, 7)]==s.extra.tolist()==s.rows.tolist()
    assert len(s.out)==20 and len(s.other)==3 and len(s.y)==len(s.up)==18
    expected = x.clone(); expected[4],expected[7] = 104,207
    assert torch.equal(s.finish(), expected)
    s.fell(s.x+300, s.rows==0)
    expected[0] = 300
    kept = [o for o in range(1, 20) if o not in (4, 7)]
    expected[kept] = x[kept]-1
    assert torch.equal(s.finish(s.x-1), expected)
    s.fell(s.x, torch.ones(18, dtype=torch.bool))
    assert not s.compact()

# --- APGD

class Bowl(nn.Module):
    "Never wrong about class 0, and with a loss that is highest at `peak`: logits are 0 and -5-|curved distance|"
    def __init__(self, peak): super().__init__(); self.peak = peak
    def forward(self, x):
        d = x-self.peak
        steep = torch.tensor([30., 10, 3, 1], dtype=x.dtype).view(1, 1, 2, 2)
        a = 5+(steep*d*d).sum((1,2,3))
        return torch.stack([0*a, -a, -2*a, -3*a], 1)

class Plateau(Bowl):
    "The gradients of a bowl, and one loss everywhere"
    def forward(self, x):
        z = super().forward(x)
        return torch.tensor([0., -1, -2, -3], dtype=x.dtype)+z-z.detach()

class Ridge(nn.Module):
    "Rises for a long time, ever more slowly, along the sphere around grey; never wrong"
    def forward(self, x):
        a = 30-(torch.tensor([50., 49, 48, 47], dtype=x.dtype).view(1, 1, 2, 2)*(x-.5).square()).sum((1,2,3))
        return torch.stack([0*a, -a, -2*a, -3*a], 1)

def _reference_apgd(threat, f, grad, x, first, steps, rho=.75):
    "Algorithm 1 of the paper, with the whole-numbered windows of its authors' code, for one image"
    window,least,shrink = (max(int(o*steps), 1) for o in (.22, .06, .03))
    adv = old = threat.project(x+threat.eps*first, x)
    f_adv,g = f(adv),grad(adv)
    best,best_f,best_g = adv,f_adv,g
    step,rises,count,cut,checked = 2*threat.eps,0,0,True,f_adv
    asked = [adv]
    for k in range(steps):
        z = threat.project(adv+step*threat.steepest(g), x)
        new = z if k==0 else threat.project(adv+.75*(z-adv)+.25*(adv-old), x)
        f_new,old,adv = f(new),adv,new
        asked.append(adv)
        g = grad(adv)
        rises += f_new>f_adv
        f_adv = f_new
        if f_new>best_f: best,best_f,best_g = adv,f_new,g
        count += 1
        if count==window:
            cut = rises<=rho*window or (not cut and best_f<=checked)
            if cut: step,adv,g = step/2,best,best_g
            checked,rises,count,window = best_f,0,0,max(window-shrink, least)
    return best,asked

@norms
@pytest.mark.parametrize('loss,steps', [('ce', 1), ('ce', 40), ('dlr', 12), ('margin', 100), ('pma', 12)])
def test_apgd_is_the_algorithm_of_the_paper(norm, loss, steps):
    x = torch.full((3, 1, 2, 2), .5, dtype=torch.float64) + torch.tensor([0., .1, -.1]).view(3, 1, 1, 1)
    labels = torch.zeros(3, dtype=torch.long)
    attack = APGD(.2, norm=norm, steps=steps, loss=loss)
    each = dict(ce=cross_entropy, margin=margin, dlr=dlr, pma=probability_margin)[loss]
    near,far = (torch.tensor(o).double().view(1, 1, 2, 2) for o in ([.53, .41, .5, .62], [.9, .1, .55, .5]))
    for net in Bowl(near), Bowl(far), Plateau(near), Ridge():
        net = Spy(net)
        found = attack(net, x, labels, _seed())
        first = attack.direction(x, _seed())
        asked = net.seen[:]
        for i in range(3):
            f = lambda o: each(net(o).float(), labels[i:i+1]).item()
            grad = lambda o: value_and_grad(net, o, labels[i:i+1], each)[2]
            best,mine = _reference_apgd(attack.threat, f, grad, x[i:i+1], first[i:i+1].double(), steps)
            theirs = torch.stack([o[i:i+1] for o in asked[:steps+1]])
            torch.testing.assert_close(theirs, torch.stack(mine), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(found[i:i+1], best, rtol=1e-4, atol=1e-5)

def test_apgd_starts_on_the_sphere():
    x = torch.full((50, 1, 3, 3), .5)
    assert APGD(.1).direction(x, _seed()).flatten(1).abs().amax(1).sub(1).abs().max()<1e-6
    assert APGD(.1).direction(x, _seed()).min()<-.9
    assert APGD(.1, norm='l2').direction(x, _seed()).flatten(1).norm(dim=1).sub(1).abs().max()<1e-6

def test_apgd_lets_go_of_what_fell_and_aims_at_each_class():
    net,x = _linear(),torch.rand(40, 1, 2, 2, generator=_seed(1), dtype=torch.float64)
    labels = net(x).argmax(1)
    spy = Spy(net)
    for attack in (APGD(1., steps=30), APGD(1., steps=30, loss='dlr', targets=3), APGD(1., steps=30, restarts=2)):
        spy.seen.clear()
        x_adv = attack(spy, x, labels, _seed())
        assert (net(x_adv).argmax(1)!=labels).all()
        assert len(spy.seen)<35 and len(spy.seen[-1])<=40            # everything falls long before the end
    strong = Bowl(torch.full((1, 1, 2, 2), .9, dtype=torch.float64))
    for attack,passes in ((APGD(.1, steps=7), 8+1), (APGD(.1, steps=7, restarts=3), 3*9),
            (APGD(.1, steps=7, loss='dlr', targets=2), 2*9+1)):
        spy = Spy(strong)
        attack(spy, x, 0*labels, _seed())
        assert len(spy.seen)==passes
        assert attack.passes==2*passes-attack.restarts*max(attack.targets, 1)-(attack.targets>0)   # those look once

def test_targeted_apgd_reaches_its_target():
    net,x = _linear(),torch.rand(20, 1, 2, 2, generator=_seed(1), dtype=torch.float64)
    labels = net(x).argmax(1)
    for eps in (.05, .2):
        attack,reached = APGD(eps, steps=30, loss='dlr', targets=4),torch.zeros(20, dtype=torch.bool)
        w,b = net[1].weight,net[1].bias
        for i in range(20):      # a linear network falls iff a corner of the box is on another's side
            for k in set(range(5))-{labels[i].item()}:
                d = w[k]-w[labels[i]]
                corner = (x[i].flatten()+eps*d.sign()).clamp(0, 1)
                reached[i] |= (corner@d+b[k]-b[labels[i]]).item()>1e-3
        fell = net(attack(net, x, labels, _seed())).argmax(1)!=labels
        assert reached.any() and not reached.all() and torch.equal(fell, reached)

@norms
@pytest.mark.parametrize('classes', [2, 3])
@pytest.mark.parametrize('make', [partial(APGD, steps=30, loss='dlr', targets=9), partial(APGD, steps=30, loss='dlr'),
    partial(FAB, steps=15), AutoAttack], ids=['APGD-T', 'APGD-DLR', 'FAB-T', 'AutoAttack'])
def test_two_and_three_classes(norm, classes, make):
    "What falls is exactly what lies nearer to the boundary of a linear network than the budget"
    net,x = _linear(classes),torch.rand(40, 1, 2, 2, generator=_seed(1), dtype=torch.float64)*.2+.4
    labels = net(x).argmax(1)
    d = _distance(net, x, labels, norm)
    eps = d.median().item()
    clear = (d/eps-1).abs()>.05
    x,labels,d = x[clear],labels[clear],d[clear]
    x_adv = make(eps, norm=norm)(net, x, labels, _seed())
    assert torch.equal(net(x_adv).argmax(1)!=labels, d<eps)

def test_apgd_refuses():
    for kw,why in [(dict(steps=0), 'steps=0'), (dict(restarts=0), 'restarts=0'),
            (dict(loss='mse'), "'ce', 'dlr', 'margin', 'pma'"), (dict(targets=2), "write loss='dlr'"),
            (dict(targets=1.5, loss='dlr'), 'targets=1.5'), (dict(targets=-1, loss='dlr'), 'targets=-1')]:
        with pytest.raises(ValueError, match=why): APGD(.1, **kw)
    with pytest.raises(ValueError, match='8/255'): APGD(8)
    assert APGD(.1, targets=1, loss='dlr').targets==1

def test_prices_and_names():
    assert APGD(.1).passes==203 and APGD(.1, steps=10, restarts=2).passes==46
    assert APGD(.1, steps=10, restarts=2, loss='dlr', targets=3).passes==23*6+1
    assert FAB(.1).passes==301*9+1 and FAB(.1, steps=10, targets=2).passes==63 and Square(.1).passes==5001
    assert APGD(.1, loss='pma').name=='APGD-PMA'
    assert AutoAttack(.1, version='fast').passes==83+1+501+1
    assert AutoAttack(.1).passes==203+(9*203+1)+(301*9+1)+5001+4
    assert [o.name for o in AutoAttack(.1).parts]==['APGD-CE', 'APGD-T', 'FAB-T', 'Square']
    assert not Square(.1).white_box and APGD(.1).white_box
    ce,square = AutoAttack(.1, version='fast').parts
    assert (ce, square)==(APGD(.1, steps=40), Square(.1, queries=500))
    assert AutoAttack(.1).parts==(APGD(.1, steps=100), APGD(.1, steps=100, loss='dlr', targets=9),
        FAB(.1, steps=100, targets=9), Square(.1, queries=5000))
    assert Square(.1).queries==5000 and FAB(.1).steps==100 and FAB(.1).targets==9 and APGD(.1).steps==100
    assert [(o.norm, o.clamp) for o in AutoAttack(.1, norm='l2', clamp=False).parts]==[('l2', False)]*4

# --- FAB

def _plane(x, w, c, norm, clamp=True):
    return to_plane(*(torch.tensor(o, dtype=torch.float64).view(-1, 1, 2, 2) for o in (x, w)),
        torch.tensor(c, dtype=torch.float64), ThreatModel(.1, norm, clamp)).flatten(1)

def test_smallest_steps_to_a_plane():
    x,w = [[.5]*4],[[1., -2, 0, 1]]
    close = lambda d,e: torch.testing.assert_close(d, torch.tensor(e, dtype=torch.float64), rtol=1e-4, atol=1e-5)
    close(_plane(x, w, [.4], 'linf'), [[.1, -.1, 0, .1]])
    close(_plane(x, w, [-.4], 'linf'), [[-.1, .1, 0, -.1]])
    close(_plane(x, w, [.6], 'l2'), [[.1, -.2, 0, .1]])
    close(_plane(x, w, [-.6], 'l2'), [[-.1, .2, 0, -.1]])
    close(_plane(x, w, [0.], 'l2'), [[0, 0, 0, 0]])
    # the first reaches 1, the others go further
    close(_plane([[.9, .5, .5, .5]], w, [.7], 'linf'), [[.1, -.2, 0, .2]])
    close(_plane([[.9, .5, .5, .5]], w, [.7], 'linf', clamp=False), [[.175, -.175, 0, .175]])
    close(_plane([[.9, .5, .5, .5]], [[2., 1, 0, 0]], [.5], 'l2'), [[.1, .3, 0, 0]])
    close(_plane([[.9, .5, .5, .5]], w, [9.], 'linf'), [[.1, -.5, 0, .5]])            # no way there: as far as can be
    close(_plane([[.5]*4, [.5]*4], [w[0], [0.]*4], [.4, .4], 'linf'), [[.1, -.1, 0, .1], [0, 0, 0, 0]])

@norms
def test_steps_to_a_plane_are_the_smallest(norm):
    "All the way or to the end of the room, and by bisection: the least stretch that gets there"
    x = torch.rand(40, 1, 3, 3, generator=_seed(), dtype=torch.float64)
    w = torch.randn(40, 1, 3, 3, generator=_seed(1), dtype=torch.float64)
    c = torch.linspace(-3, 3, 40, dtype=torch.float64)
    d = to_plane(x, w, c, ThreatModel(.1, norm))
    for i in range(40):
        v = w[i]*c[i].sign()
        room,speed = torch.where(v>0, 1-x[i], x[i]),v.abs() if norm=='l2' else torch.ones_like(v)
        walk = lambda t: v.sign()*torch.minimum(t*speed, room)
        lo,hi = 0.,1e3
        for _ in range(80):
            t = (lo+hi)/2
            lo,hi = (t,hi) if (v*walk(t)).sum()<c[i].abs() else (lo,t)
        torch.testing.assert_close(d[i], walk(hi), rtol=1e-3, atol=1e-4)

def _distance(net, x, labels, norm):
    "The exact distance of each image from the boundary of a linear network, and its class"
    w,b = net[1].weight.detach(),net[1].bias.detach()
    gaps = net(x).detach()
    found = []
    for i,l in enumerate(labels.tolist()):
        found.append(min(((gaps[i,l]-gaps[i,k])/(w[k]-w[l]).norm(p=1 if norm=='linf' else 2)).item()
            for k in range(len(b)) if k!=l))
    return torch.tensor(found)

@norms
def test_fab_finds_the_boundary_of_a_linear_network(norm):
    net,x = _linear(),torch.rand(30, 1, 2, 2, generator=_seed(2), dtype=torch.float64)*.2+.4
    labels = net(x).argmax(1)
    d = _distance(net, x, labels, norm)
    i = ((d>.02) & (d<.3)).nonzero()[:,0][:8]
    assert len(i)>4
    for k in i.tolist():
        for share,fell in (1.02, True), (.98, False):
            x_adv = FAB(d[k].item()*share, norm=norm, steps=15)(net, x[k:k+1], labels[k:k+1])
            assert (net(x_adv).argmax(1)!=labels[k]).item()==fell
            if not fell: assert torch.equal(x_adv, x[k:k+1])

@norms
@pytest.mark.parametrize('clamp', [True, False])
def test_fab_takes_the_steps_of_the_paper(norm, clamp):
    net,x = Spy(_linear()),torch.tensor([.01, .98, .02, .5], dtype=torch.float64).view(1, 1, 2, 2)
    label = net(x).argmax(1)
    attack = FAB(1e-3, norm=norm, clamp=clamp, steps=6, targets=1)        # too small a budget to succeed
    target = ranked_classes(net, x, label, 1)[0,0]
    net.seen.clear()
    attack(net, x, label)
    w = (net.net[1].weight[target]-net.net[1].weight[label[0]]).detach().view_as(x)
    gap = lambda o: (net.net(o)[0,target]-net.net(o)[0,label[0]]).detach()
    length = lambda o: o.abs().max() if norm=='linf' else o.norm()
    adv,asked = x,[]
    for _ in range(6):
        here = to_plane(adv, w, -gap(adv)[None], attack.threat)
        there = to_plane(x, w, (-gap(adv)+(w*(adv-x)).sum())[None], attack.threat)
        a = min(length(here)/(length(here)+length(there)), .1)
        new = (1-a)*(adv+1.05*here)+a*(x+1.05*there)
        if clamp: new = new.clamp(0, 1)
        asked += [adv,new]
        adv = x+.9*(new-x) if net.net(new).argmax(1)!=label else new
    torch.testing.assert_close(torch.stack(net.seen[1:13]), torch.stack(asked), rtol=1e-4, atol=1e-6)
    assert clamp or torch.stack(asked).min()<0 or torch.stack(asked).max()>1

@norms
def test_without_slopes_nothing_moves(norm):
    "Neither NaN nor a change that gains nothing"
    net = Spy(lambda x: torch.tensor([3., 2, 1, 0]).repeat(len(x), 1)+0*x.flatten(1)[:,:1])
    x = torch.rand(2, 1, 4, 4, generator=_seed())
    labels = torch.zeros(2, dtype=torch.long)
    assert torch.equal(FAB(.1, norm=norm, steps=3)(net, x, labels), x)
    assert APGD(.1, norm=norm, steps=3)(net, x, labels).isfinite().all()
    net.seen.clear()
    assert torch.equal(Square(.1, norm=norm, queries=20)(net, x, labels, _seed()), net.seen[0])

def test_fab_refuses():
    for kw,why in [(dict(eps=.1, steps=0), 'steps=0'), (dict(eps=.1, targets=0), 'targets=0'), (dict(eps=8), '8/255')]:
        with pytest.raises(ValueError, match=why): FAB(**kw)

# --- Square

def test_squares_shrink():
    square = Square(.1)
    for k,halvings in [(0, 0), (10, 0), (11, 1), (50, 1), (51, 2), (200, 2), (201, 3), (500, 3), (501, 4), (1000, 4),
            (1001, 5), (2001, 6), (4001, 7), (6001, 8), (8000, 8), (8001, 9)]:
        assert square._share(k)==.8/2**halvings
    assert Square(.1, p=.4)._share(0)==.4
    for kw,why in [(dict(queries=0), 'queries=0'), (dict(eps=8), '8/255')]:
        with pytest.raises(ValueError, match=why): Square(**(dict(eps=.1) | kw))

def test_stripes_and_squares():
    x = torch.full((3, 2, 9, 7), .5)
    draw = _Draw(_seed(), 'cpu')
    search = _LinfSearch(Square(.1), draw)
    stripes = (search.first(x)-x)/.1
    assert torch.allclose(stripes.abs(), torch.ones_like(x))
    assert torch.allclose(stripes, stripes[:,:,:1].expand_as(x)) and stripes.std((0, 1, 2)).min()>.5
    places = set()
    for share,side in [(.8, 7), (.4, 5), (.1, 3), (1e-4, 1)]*5:
        new = search.change(x, search.first(x), share)
        assert torch.allclose((new-x).abs(), torch.full_like(x, .1))
        for _ in range(6):
            new = search.change(x, x, share)
            rows,cols = (new!=x)[0,0].any(1).nonzero()[:,0],(new!=x)[0,0].any(0).nonzero()[:,0]
            assert len(rows)==len(cols)==min(side, 7) and rows[-1]-rows[0]==cols[-1]-cols[0]==side-1
            assert all(torch.equal(new[i,c][rows][:,cols], new[0,c,rows[0],cols[0]].expand(side, side))
                for i in range(3) for c in range(2))
            places.add((side, rows[0].item(), cols[0].item()))
    assert {o[1:] for o in places if o[0]==7}=={(0, 0), (1, 0), (2, 0)}
    white = torch.ones_like(x)
    assert search.change(white, white, .8).max()==1
    free = _LinfSearch(Square(.1, clamp=False), _Draw(_seed(1), 'cpu'))
    assert free.change(white, white, .8).sub(1).abs().max()>.09
    assert {round(search.change(x, x, .8).sub(x).max().item(), 3) for _ in range(20)}=={0., .1}

def test_windows_are_everywhere():
    draw = _Draw(_seed(), 'cpu')
    found = {tuple((o.start, o.stop) for o in draw.window(5, 4, 3)) for _ in range(200)}
    assert found=={((i, i+3), (j, j+3)) for i in range(3) for j in range(2)}
    signs = draw.signs(50, 2, 1, 1)
    assert signs.shape==(50, 2, 1, 1) and set(signs.flatten().tolist())=={-1, 1} and abs(signs.mean())<.3

@pytest.mark.parametrize('side', [1, 2, 3, 5, 8])
def test_a_bump_is_a_hill_beside_its_negative(side):
    draw,found = _Draw(_seed(), 'cpu'),[]
    for _ in range(20):
        b = _bump(side, draw)
        assert b.shape==(side, side) and abs(b.norm()-1)<1e-6
        found.append(b)
    assert any(not torch.equal(found[0], o) for o in found) or side==1
    b = next((o for o in found if (o[0]>0).all()), None)
    if side>1:
        top,low = b[:side//2],b[side//2:]
        assert (top>0).all() and (low<0).all() and abs(top.norm()-low.norm())<1e-6
        h,w = low.shape                       # every half is a stack of plates, the k-th of them 1/(k+1)^2 high
        plates = torch.zeros(h, w)
        for k in range(max(h, w)//2+1):
            for i in range(h):
                for j in range(w):
                    if max(abs(i-h//2), abs(j-w//2))<=k: plates[i,j] += 1/(k+1)**2
        torch.testing.assert_close(-low/low.norm(), plates/plates.norm())

def test_bumps_cover_the_image_and_moves_keep_the_length():
    x = torch.full((3, 2, 11, 12), .5)
    search = _L2Search(Square(.3, norm='l2'), _Draw(_seed(), 'cpu'))
    length = lambda o: (o-x).flatten(1).norm(dim=1)
    start = search.first(x)
    torch.testing.assert_close(length(start), torch.full((3,), .3))
    d = start-x                                # tiles of 11//5 = 2, in the middle of what is left over: 5 x 6 of them
    assert (d[:,:,10]==0).all() and (d[:,:,:10]!=0).all()
    tiles = d[:,:,:10].unflatten(2, (5, 2)).unflatten(4, (6, 2)).square().sum((3, 5))
    torch.testing.assert_close(tiles, tiles[:1,:1,:1,:1].expand_as(tiles))
    assert (d[0]!=d[1]).any() and (d[:,0]!=d[:,1]).any()
    small = search.first(torch.full((1, 1, 3, 3), .5))-.5
    assert torch.allclose(small.abs(), torch.full_like(small, .1))
    # one row and one column are left over, and 13%2//2 = 0
    odd = search.first(torch.full((1, 1, 13, 15), .5))-.5
    assert (odd[:,:,12]==0).all() and (odd[:,:,:,14]==0).all() and (odd[:,:,:12,:14]!=0).all()
    wide = search.first(torch.full((1, 1, 17, 19), .5))-.5     # tiles of 3: 17%3//2 = 1, 19%3//2 = 0
    assert (wide[:,:,0]==0).all() and (wide[:,:,16]==0).all() and (wide[:,:,1:16,:18]!=0).all()
    assert (wide[:,:,:,18]==0).all()
    for share in (.8, .1, .001):
        adv = start
        for _ in range(10):
            new = search.change(x, adv, share)
            torch.testing.assert_close(length(new), torch.full((3,), .3))
            adv = new

@pytest.mark.parametrize('share,side', [(.8, 11), (.25, 7), (.1, 5), (.05, 3), (.0001, 3)])
def test_a_move_takes_from_one_window_and_gives_to_another(share, side):
    "As in the paper's algorithm 3: what the two windows held, and what the budget has left, is given to one of them"
    x = torch.full((2, 2, 11, 12), .5, dtype=torch.float64)
    attack = Square(.3, norm='l2')
    for seed in range(6):
        adv = x+(_L2Search(attack, _Draw(_seed(9), 'cpu')).first(x)-x)*.9     # a tenth of the length is free
        draw = _Draw(_seed(seed), 'cpu')
        to,off = ((...,*draw.window(11, 12, side)) for _ in range(2))
        b,signs = _bump(side, draw),draw.signs(2, 2, 1, 1)
        new = _L2Search(attack, _Draw(_seed(seed), 'cpu')).change(x, adv, share)-x
        d = adv-x
        for i in range(2):
            left = .09-d[i].square().sum()
            result = d[i].clone()
            for c in range(2):
                held = torch.zeros(11, 12, dtype=torch.bool)
                held[to[1:]],held[off[1:]] = True,True
                lengths = sum(d[i,k][held].square().sum() for k in range(2))
                h = b*signs[i,c]+d[i,c][to[1:]]/d[i,c][to[1:]].norm().clamp_min(1e-12)
                result[c][off[1:]] = 0
                result[c][to[1:]] = h/h.norm()*(left/2+lengths).sqrt()
            torch.testing.assert_close(new[i], (result*.3/result.norm()), rtol=1e-5, atol=1e-7)

@pytest.mark.parametrize('norm,eps', [('linf', .1), ('l2', .1), ('l1', .3), ('l0', 1)])
def test_square_keeps_the_best_that_it_has_seen(norm, eps):
    net = Spy(Bowl(torch.full((1, 1, 2, 2), .9, dtype=torch.float64)))
    x = torch.rand(5, 1, 2, 2, generator=_seed(), dtype=torch.float64)*.2+.4
    labels = torch.zeros(5, dtype=torch.long)
    found = Square(eps, norm=norm, queries=40)(net, x, labels, _seed())
    assert len(net.seen)==41
    margins = torch.stack([margin(net.net(o), labels) for o in net.seen])
    torch.testing.assert_close(margin(net.net(found), labels), margins.max(0).values)
    best = margins[0].clone()                     # every proposal departs from the best so far
    for k in range(1, 41): best = torch.maximum(best, margins[k])
    assert (best>margins[0]).any()

@pytest.mark.parametrize('norm', ['linf', 'l2', 'l1', 'l0'])
def test_square_lets_go_of_what_fell(norm):
    net,x = Spy(_linear()),torch.rand(40, 1, 2, 2, generator=_seed(1), dtype=torch.float64)
    labels = net(x).argmax(1)
    net.seen.clear()
    found = Square(1., norm=norm, queries=300)(net, x, labels, _seed())
    assert len(net.seen[0])==40>len(net.seen[-1]) and (net.net(found).argmax(1)!=labels).sum()>20

# --- the ensemble

def test_each_part_sees_only_what_stands():
    net,x = Spy(_linear()),torch.rand(30, 1, 2, 2, generator=_seed(1), dtype=torch.float64)
    labels = net(x).argmax(1)
    d = _distance(net.net, x, labels, 'linf')
    eps = d.median().item()
    sizes = []
    class Logged(AutoAttack):
        @property
        def parts(self):
            return tuple(Wrapped(self.eps, part=p)
                         for p in (APGD(eps, steps=20), FAB(eps, steps=3), Square(eps, queries=3)))
    class Wrapped(Attack):
        def __init__(self, eps, part): object.__setattr__(self, 'eps', eps); object.__setattr__(self, 'part', part)
        def craft(self, model, x, y, generator):
            sizes.append(len(x))
            return self.part(model, x, y, generator)
    x_adv = Logged(eps)(net, x, labels, _seed())
    stood = (net.net(x_adv).argmax(1)==labels).sum().item()
    assert sizes[0]==30 and 0<stood<=sizes[1]<30 and sizes[2]<=sizes[1]
    sizes.clear()
    Logged(1.)(net, x, labels, _seed())
    assert sizes[0]==30 and len(sizes)<3 or sizes[-1]<30
    with pytest.raises(ValueError, match="'standard', 'fast'"): AutoAttack(.1, version='plus')
    with pytest.raises(ValueError, match='8/255'): AutoAttack(8)
