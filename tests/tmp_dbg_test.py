from test_web_client import *
from test_web_client import server, page, bundle, driver, tiny_folder, expected
import time
@pytest.mark.parametrize("i", range(6))
def test_dbg(driver, page, server, i):
    st = [True, False, True, False, True, False][i]
    t0=time.time()
    ask(driver, page, server, LONG, st)
    m=lambda: re.findall(r"^calm_(running|cancelled_total|finished_total) (\S+)", get(server+"/metrics"), re.M)
    while m()[0][1]=="0.0": pass
    print(i, st, m(), time.time()-t0)
    driver.get(page+"nothing"); t0=time.time()
    while m()[0][1]!="0.0" and time.time()-t0<20: time.sleep(.01)
    print("  left", m(), time.time()-t0)
