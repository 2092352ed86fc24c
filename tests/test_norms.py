"Budgets in l1 and l0 beside those in l-inf and l2: projections against other solvers, directions, starts"
from itertools import combinations
import numpy as np
import pytest, torch
from adverfine.threat import norm_names, ThreatModel
from adverfine.attacks.gradient import PGD

def _seed(n=0): return torch.Generator().manual_seed(n)
def _rand(*shape, seed=0, dtype=torch.float64): return torch.rand(*shape, generator=_seed(seed), dtype=dtype)
def _noise(x, seed=1): return torch.randn(x.shape, generator=_seed(seed), dtype=x.dtype)

budgets = dict(linf=.1, l2=.5, l1=2.5, l0=3)
threats = [ThreatModel(e, n, c) for n,e in budgets.items() for c in (True, False)]
threats += [ThreatModel(o, n) for o in (0, 1) for n in norm_names] + [ThreatModel(1000., n) for n in ('l2', 'l1', 'l0')]

# --- the threat model

def test_budgets_of_each_norm():
    for norm in ('l2', 'l1', 'l0'):
        for eps in (0, 1, 5, 5., 3000): assert ThreatModel(eps, norm).eps==eps
        for eps in (-1, -.01, float('nan'), float('inf'), -float('inf')):
            with pytest.raises(ValueError, match=f'eps={eps} must be 0 or more'): ThreatModel(eps, norm)
    for eps in (.5, 8/255, 2.000001):
        with pytest.raises(ValueError, match=f'eps={eps} must be a whole number'): ThreatModel(eps, 'l0')
    with pytest.raises(ValueError, match='8/255, not 8'): ThreatModel(8)

def test_a_budget_says_its_unit():
    assert str(ThreatModel(8/255))=='l-inf, eps 0.03137 in pixels (8/255), images kept in [0,1]'
    assert str(ThreatModel(.5, 'l2', False))=='l2, eps 0.5 in pixels (127.5/255), images may leave [0,1]'
    assert str(ThreatModel(12, 'l1'))=='l1, eps 12 in pixels summed over the image, images kept in [0,1]'
    assert [ThreatModel(o, 'l0').size for o in (1, 12345.)]==['eps 1 pixel', 'eps 12345 pixels']

def test_a_sum_over_many_values_may_round_by_more():
    x,threat = torch.full((1, 3, 40, 40), .5, dtype=torch.float64),ThreatModel(1, 'l1')
    def off(d): return x + d*_rand(*x.shape)/_rand(*x.shape).sum()
    assert threat.slack(x)==pytest.approx(1e-6+1e-7*4800**.5)
    threat.check(off(1+7e-6), x)
    with pytest.raises(ValueError, match='left its budget'): threat.check(off(1+9e-6), x)

def test_a_share_of_pixels_is_whole():
    for eps in (0, 1, 7, 10, 50, 100):
        shares = [ThreatModel(eps, 'l0').scaled(k/100).eps for k in range(101)]
        assert shares==[eps*k//100 for k in range(101)]
    assert ThreatModel(3., 'l1').scaled(.25)==ThreatModel(.75, 'l1')
    assert PGD(5, norm='l0', step_size=4.).scaled(.5)==PGD(2, norm='l0', step_size=2.)
    assert PGD(5, norm='l1').scaled(.5)==PGD(2.5, norm='l1')

def test_distances():
    x = torch.full((1, 3, 2, 2), .5, dtype=torch.float64)
    x_adv = x.clone()
    x_adv[0,:,0,0] += torch.tensor([.1, -.2, .3])
    x_adv[0,1,1,1] -= .4
    far = [ThreatModel(0, n).distance(x_adv, x).item() for n in ('linf', 'l2', 'l1', 'l0')]
    assert far==pytest.approx([.4, .3**.5, 1., 2])
    x_adv[0,0,0,1] = float('nan')
    for n in norm_names:
        with pytest.raises(ValueError, match='left its budget'): ThreatModel(1, n, clamp=False).check(x_adv, x)

def test_a_pixel_too_many_is_refused():
    x = _rand(1, 3, 4, 4, dtype=torch.float32)*.5
    x_adv = x.clone()
    x_adv[0,0,0,0] += 1e-7
    x_adv[0,2,1,1] += .5
    ThreatModel(2, 'l0').check(x_adv, x)
    with pytest.raises(ValueError, match='2 away in l0, but eps=1'): ThreatModel(1, 'l0').check(x_adv, x)

# --- projections

@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('threat', threats, ids=str)
def test_projection(threat, dtype):
    "Within ball and range, once and for all; what is inside already stays"
    x = _rand(20, 3, 5, 4, dtype=dtype).round(decimals=1)                # some values are at the edge of the range
    for size in (1e-3, .3, 1., 30.):
        near = threat.project(x + size*_noise(x), x)
        threat.check(near, x)
        torch.testing.assert_close(threat.project(near, x), near, rtol=0, atol=2e-6)
        torch.testing.assert_close(threat.projection(x)(x + size*_noise(x)), near, rtol=0, atol=0)
    start = threat.random_start(x, _seed())
    threat.check(start, x)
    torch.testing.assert_close(threat.project(start, x), start, rtol=0, atol=2e-6)

@pytest.mark.parametrize('threat', [t for t in threats if t.norm!='l2' or not t.clamp], ids=str)
def test_nothing_feasible_is_nearer(threat):
    x = _rand(30, 2, 3, 3).round(decimals=1)
    far = x + _noise(x)*.6
    near = threat.project(far, x)
    away = (near-far).flatten(1).norm(dim=1)
    for k in range(60):                                                  # other feasible points, near and far from it
        other = threat.project(near + _noise(x, k)*(.001, .03, 1)[k%3], x)
        assert ((other-far).flatten(1).norm(dim=1)>=away-1e-9).all()

def _bisected(d, room, eps):
    "The change nearest to `d` by 200 halvings in numpy, for one image"
    size,(low,high) = np.abs(d),(0., np.abs(d).max())
    for _ in range(200):
        t = (low+high)/2
        low,high = (t, high) if np.minimum(np.maximum(size-t, 0), room).sum()>eps else (low, t)
    t = 0. if np.minimum(size, room).sum()<=eps else high
    return np.sign(d)*np.minimum(np.maximum(size-t, 0), room)

@pytest.mark.parametrize('clamp', [True, False])
@pytest.mark.parametrize('eps', [.01, .7, 3., 12., 40.])
def test_l1_projection_against_a_bisection(eps, clamp):
    for shape,size in [((40, 1, 2, 2), .5), ((40, 3, 4, 4), .1), ((10, 3, 16, 16), 2.), ((10, 3, 16, 16), .01)]:
        x = _rand(*shape, seed=3).round(decimals=1)
        d = _noise(x)*size
        d[::2] = d[::2].round(decimals=1)                                # ties, and changes of nothing
        ours = ThreatModel(eps, 'l1', clamp).project(x+d, x)-x
        room = torch.where(d>0, 1-x, x) if clamp else torch.full_like(x, torch.inf)
        theirs = np.stack([_bisected(*o, eps) for o in zip(d.flatten(1).numpy(), room.flatten(1).numpy())])
        np.testing.assert_allclose(ours.flatten(1).numpy(), theirs, atol=1e-12)
        few = ThreatModel(eps, 'l1', clamp).project((x+d).float(), x.float())-x.float()
        np.testing.assert_allclose(few.flatten(1).numpy(), theirs, atol=1e-6)

def test_l1_projection_against_a_general_solver():
    "scipy's SLSQP, with a positive and a negative part of each change as variables"
    optimize = pytest.importorskip('scipy.optimize')
    for seed in range(8):
        x = _rand(1, 1, 1, 5, seed=seed)
        far = (x + _noise(x, seed+50)).flatten().numpy()
        def away(v): return ((x.flatten().numpy()+v[:5]-v[5:]-far)**2).sum()
        bounds = [(0, 1-o) for o in x.flatten().tolist()]+[(0, o) for o in x.flatten().tolist()]
        budget = dict(type='ineq', fun=lambda v: .8-v.sum())
        exactly = dict(ftol=1e-14, maxiter=500)
        v = optimize.minimize(away, np.full(10, .01), bounds=bounds, constraints=budget, options=exactly).x
        ours = ThreatModel(.8, 'l1').project(torch.tensor(far).view_as(x), x)-x
        np.testing.assert_allclose(ours.flatten().numpy(), v[:5]-v[5:], atol=1e-6)

def test_l0_projection_tries_all_sets_of_pixels():
    x = _rand(12, 3, 2, 3, seed=4)
    far = x + _noise(x)
    near = ThreatModel(2, 'l0').project(far, x)
    best = torch.full((12,), torch.inf, dtype=torch.float64)
    for a,b in combinations(range(6), 2):
        other = x.clone().flatten(2)
        other[...,[a, b]] = far.flatten(2)[...,[a, b]].clamp(0, 1)
        best = torch.minimum(best, (other-far.flatten(2)).square().sum((1,2)))
    torch.testing.assert_close((near-far).square().sum((1,2,3)), best)
    huge = ThreatModel(1, 'l0').project(x.float()+1e6*_noise(x).float(), x.float())
    assert ((huge==0) | (huge==1) | (huge==x.float())).all()

# --- directions and starts

def test_steepest_in_l1_and_l0():
    grad = torch.tensor([[3., -4, 1, 0], [0, 0, 0, 0], [1e-3, 0, 0, 0]]).view(3, 1, 2, 2)
    def direction(eps, norm, **kw): return ThreatModel(eps, norm, **kw).steepest(grad, x).flatten(1).tolist()
    x = torch.full_like(grad, .5)
    assert direction(.1, 'l1')==[[0, -1, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0]]
    assert direction(2, 'l1')==[[.5, -.5, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0]]
    assert direction(1000, 'l1')[0]==pytest.approx([1/3, -1/3, 1/3, 0])
    assert direction(1, 'l0')==[[.75, -1, .25, 0], [0, 0, 0, 0], [1, 0, 0, 0]]==direction(0, 'l0')
    assert direction(2, 'l0')[0]==pytest.approx([3/7, -4/7, 1/7, 0])
    x[0,0,0] = torch.tensor([1., 0])                                     # no room for the first two
    assert direction(1, 'l1')[0]==[0, 0, 1, 0]==direction(1, 'l0')[0]
    assert direction(1, 'l1', clamp=False)[0]==[0, -1, 0, 0]
    colours = torch.tensor([[[3., 2], [3, 2]], [[-1, 2], [0, 2]]]).transpose(0, 1)[None]
    assert ThreatModel(1, 'l0').steepest(colours).abs().mean(1).amax()==1 # of two channels

@pytest.mark.parametrize('norm', ['l1', 'l0'])
def test_random_starts(norm):
    x = torch.full((3000, 2, 2, 2), .5, dtype=torch.float64)
    threat = ThreatModel(dict(l1=.1, l0=2)[norm], norm)
    start = threat.random_start(x, _seed())
    assert start.dtype==x.dtype and torch.equal(start, threat.random_start(x, _seed()))
    assert not torch.equal(start, threat.random_start(x, _seed(1)))
    assert ((start-x).mean(0).abs()<.02).all()
    if norm=='l0':
        assert (threat.distance(start, x)==2).all() and start.min()<.01 and start.max()>.99
        assert ((start!=x).any(1).double().mean(0)-.5).abs().max()<.03
    else:
        for share in (.1, .5, .9): assert abs((threat.distance(start, x)<share*.1).double().mean()-share)<.03
        # shares of the sum that are uniform on the simplex: their squares add up to 2/(n+1) on average
        shares = (start-x).abs().flatten(1)/threat.distance(start, x)[:,None]
        assert abs(shares.square().sum(1).mean()-2/9)<.006
