"""Facts for the look-up skill: capitals of countries, symbols and atomic numbers of chemical elements."""

from __future__ import annotations

_CAPITALS = """
Afghanistan Kabul;Albania Tirana;Algeria Algiers;Angola Luanda;Argentina Buenos Aires;Armenia Yerevan;
Australia Canberra;Austria Vienna;Azerbaijan Baku;Bahrain Manama;Bangladesh Dhaka;Belarus Minsk;Belgium Brussels;
Belize Belmopan;Bhutan Thimphu;Botswana Gaborone;Brazil Brasilia;Bulgaria Sofia;Cambodia Phnom Penh;
Cameroon Yaounde;Canada Ottawa;Chad N'Djamena;Chile Santiago;China Beijing;Colombia Bogota;Croatia Zagreb;
Cuba Havana;Cyprus Nicosia;Denmark Copenhagen;Ecuador Quito;Egypt Cairo;Eritrea Asmara;Estonia Tallinn;
Ethiopia Addis Ababa;Fiji Suva;Finland Helsinki;France Paris;Gabon Libreville;Georgia Tbilisi;Germany Berlin;
Ghana Accra;Greece Athens;Guyana Georgetown;Haiti Port-au-Prince;Hungary Budapest;Iceland Reykjavik;
India New Delhi;Indonesia Jakarta;Iran Tehran;Iraq Baghdad;Ireland Dublin;Italy Rome;Jamaica Kingston;Japan Tokyo;
Jordan Amman;Kenya Nairobi;Laos Vientiane;Latvia Riga;Lebanon Beirut;Liberia Monrovia;Libya Tripoli;
Lithuania Vilnius;Madagascar Antananarivo;Malawi Lilongwe;Malaysia Kuala Lumpur;Mali Bamako;Malta Valletta;
Mexico Mexico City;Moldova Chisinau;Mongolia Ulaanbaatar;Morocco Rabat;Mozambique Maputo;Namibia Windhoek;
Nepal Kathmandu;Netherlands Amsterdam;Nicaragua Managua;Niger Niamey;Nigeria Abuja;Norway Oslo;Oman Muscat;
Pakistan Islamabad;Paraguay Asuncion;Peru Lima;Philippines Manila;Poland Warsaw;Portugal Lisbon;Qatar Doha;
Romania Bucharest;Russia Moscow;Rwanda Kigali;Senegal Dakar;Serbia Belgrade;Slovakia Bratislava;
Slovenia Ljubljana;Somalia Mogadishu;Spain Madrid;Sudan Khartoum;Sweden Stockholm;Syria Damascus;Thailand Bangkok;
Togo Lome;Tunisia Tunis;Turkey Ankara;Uganda Kampala;Ukraine Kyiv;Uruguay Montevideo;Uzbekistan Tashkent;
Venezuela Caracas;Vietnam Hanoi;Yemen Sanaa;Zambia Lusaka;Zimbabwe Harare
"""

# In the order of the atomic numbers, from 1.
_ELEMENTS = """
Hydrogen H;Helium He;Lithium Li;Beryllium Be;Boron B;Carbon C;Nitrogen N;Oxygen O;Fluorine F;Neon Ne;Sodium Na;
Magnesium Mg;Aluminium Al;Silicon Si;Phosphorus P;Sulfur S;Chlorine Cl;Argon Ar;Potassium K;Calcium Ca;
Scandium Sc;Titanium Ti;Vanadium V;Chromium Cr;Manganese Mn;Iron Fe;Cobalt Co;Nickel Ni;Copper Cu;Zinc Zn;
Gallium Ga;Germanium Ge;Arsenic As;Selenium Se;Bromine Br;Krypton Kr;Rubidium Rb;Strontium Sr;Yttrium Y;
Zirconium Zr;Niobium Nb;Molybdenum Mo;Technetium Tc;Ruthenium Ru;Rhodium Rh;Palladium Pd;Silver Ag;Cadmium Cd;
Indium In;Tin Sn;Antimony Sb;Tellurium Te;Iodine I;Xenon Xe;Caesium Cs;Barium Ba;Lanthanum La;Cerium Ce;
Praseodymium Pr;Neodymium Nd;Promethium Pm;Samarium Sm;Europium Eu;Gadolinium Gd;Terbium Tb;Dysprosium Dy;
Holmium Ho;Erbium Er;Thulium Tm;Ytterbium Yb;Lutetium Lu;Hafnium Hf;Tantalum Ta;Tungsten W;Rhenium Re;Osmium Os;
Iridium Ir;Platinum Pt;Gold Au;Mercury Hg;Thallium Tl;Lead Pb;Bismuth Bi;Polonium Po;Astatine At;Radon Rn;
Francium Fr;Radium Ra;Actinium Ac;Thorium Th;Protactinium Pa;Uranium U
"""

PHRASINGS = {
    "capital": (
        "What is the capital of {}?",
        "Which city is the capital of {}?",
        "Name the capital of {}.",
        "Capital of {}?",
        "{}: capital city?",
        "The capital of {} is",
    ),
    "symbol": (
        "What is the symbol of {}?",
        "Which symbol stands for {}?",
        "Name the symbol of {}.",
        "Symbol of {}?",
        "{}: chemical symbol?",
        "The symbol of {} is",
    ),
    "number": (
        "What is the atomic number of {}?",
        "Which atomic number has {}?",
        "Name the atomic number of {}.",
        "Atomic number of {}?",
        "{}: atomic number?",
        "The atomic number of {} is",
    ),
}
"""Each relation's questions; every question is a subject put into one of them."""


def _entries(table: str) -> list[tuple[str, str]]:
    return [tuple(entry.split(" ", 1)) for entry in table.replace("\n", "").split(";")]  # type: ignore[misc]


FACTS: tuple[tuple[str, str, str], ...] = (
    *(("capital", country, city) for country, city in _entries(_CAPITALS)),
    *(("symbol", element.lower(), symbol) for element, symbol in _entries(_ELEMENTS)),
    *(("number", element.lower(), str(number)) for number, (element, _) in enumerate(_entries(_ELEMENTS), start=1)),
)
"""(relation, subject, answer)"""
