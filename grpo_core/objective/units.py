"""Names of units that may follow a number.

Other short words after a number, as in 6xy and 4ac, are products of variables.
"""

_LENGTHS = "mm cm dm km nm um in ft yd mi inch inches foot feet yard yards mile miles metre metres meter meters"
_OTHERS = """kg mg ug gm gms kgs lb lbs oz ton tons gram grams pound pounds ounce ounces ml mL dl dL cl cL kL gal pt qt
    cup cups tsp tbsp hr hrs min mins sec secs ms ns us yr yrs yo day days hour hours minute minutes second
    seconds week weeks month months year years mph kph kmh km/h mi/h m/s ft/s rpm bps fps kW MW GW mW kV mV
    kJ MJ kN eV keV MeV kWh Wh Hz kHz MHz GHz Pa kPa MPa dB KB MB GB TB kB Kb Mb Gb mol rad rads deg degs cc
    cu sq ha px pts pc pcs pp ct cts ea USD EUR GBP JPY CNY INR CHF CAD AUD Rs RM US pm am PM AM th st nd rd
    percent degree degrees unit units sq per"""
LENGTH = "|".join(sorted(_LENGTHS.split(), key=len, reverse=True))
KNOWN_UNIT = "|".join(sorted({*_LENGTHS.split(), *_OTHERS.split()}, key=len, reverse=True))
