"""List the English words of the generated world by their role in a sentence.

The order is frequency rank: the first words are common.
"""

from __future__ import annotations

POSITIVE = """
good great nice lovely excellent wonderful pleasant superb charming delightful amazing fantastic \
brilliant splendid
perfect helpful friendly tasty elegant comfortable impressive enjoyable beautiful reliable \
generous honest
""".split()

NEGATIVE = """
bad awful poor terrible horrible boring nasty dreadful unpleasant ugly disappointing rude dirty \
annoying broken clumsy
useless dull lousy shabby sloppy painful gloomy stale tedious careless
""".split()

NEUTRAL = """
new old big small red blue green wooden round square local foreign daily white black long short \
grey paper metal
narrow wide northern southern yellow plastic digital annual printed striped
""".split()

LIKES = "love like enjoy admire recommend adore praise appreciate".split()

DISLIKES = "hate dislike regret detest avoid despise loathe resent".split()

ACTS = (
    "see order visit describe watch photograph mention count carry pass find use open notice borrow"
).split()

TOPICS = """
food service room film hotel book waiter soup story plot coffee phone shop staff music garden \
actor dinner ticket
camera song kitchen driver bread guide novel market lamp museum teacher painting bus salad chair \
doctor window bed
concert tea author cake blanket beach screen ferry actress battery menu jacket lesson bridge \
scene cheese poem
keyboard pillow speech mirror tour chapter pasta dancer sauce engine gallery barber carpet \
lecture harbour piano
terrace editor wallet drum lobby sandwich costume elevator boat statue bicycle magazine \
orchestra vase album necklace
carriage
""".split()

PEOPLE = """
friend brother sister mother father cousin uncle aunt neighbour colleague boss daughter son \
grandmother grandfather
nephew niece partner roommate landlord tutor captain nurse lawyer
""".split()

PLACES = """
station airport office city village river mountain hospital library school theatre castle church \
stadium island valley
square-market tower farm forest embassy factory lake desert
""".split()

TIMES = """
monday tuesday wednesday thursday friday saturday sunday january february april june july august \
october december
morning evening weekend holiday winter summer
""".split()

# These words keep the polarity of the word that they modify.
STRENGTH = "very really quite so truly rather extremely absolutely".split()

# These words reverse the polarity, as a negation does.
WEAKENERS = "hardly barely scarcely".split()

# Exclamations at the beginning of running text; tasks never contain them. By label: negative,
# neutral, positive.
EXCLAMATIONS = ("alas ugh yuck".split(), "well hm okay".split(), "hurray bravo yay".split())

FUNCTION = (
    "the was i did not and but although , said that think expected to be on at in with my when we "
    "were"
).split()

# Words of questions. They come last, so that the stems of all other words are independent of them.
QUESTION = "where whom who".split()

# The words of the tasks' prompts and their labels; only text for generative models has them, as
# headings.
HEADINGS = "Sentiment Premise Hypothesis Label Context Question Answer".split()
NAMES = "negative neutral positive entailment contradiction".split()
