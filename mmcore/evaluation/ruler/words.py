"""Words for keys of needles: an adjective and a noun. (RULER draws from the lists of the library wonderwords.)"""

ADJECTIVES = """
able absent aged agile amber ample ancient arctic ashen autumn azure bashful basic bitter blank blue bold brave brief
bright brisk broad bronze busy calm candid careful cheap chief chilly civic clean clear clever cloudy coarse cold
common cool copper coral cozy crimson crisp curious curly daily damp daring dark dear deep dense direct distant double
drowsy dry dusty eager early earnest easy elder empty equal evening exact faint fair faithful famous fancy fast
fertile fierce final fine firm flat fluent fond formal fragile free fresh frosty frozen gentle giant glad global
golden grand grassy grave green grey handy happy hardy harsh hasty heavy hidden high hollow honest humble icy ideal
idle inner jolly jumbo keen kind large late lavish lazy lean level light linen little lively local lofty lonely long
loud loyal lucid lucky lunar major marble mellow merry mighty mild misty modern modest narrow native neat nimble noble
normal novel oaken odd olive open orange outer pale patient peaceful plain pleasant polite proud pure purple quaint
quick quiet rapid rare ready regal rich rigid ripe rocky rosy rough round royal rural rusty sandy scarlet secret
serene shady sharp shiny short silent silken silver simple sleepy slender slow small smooth snowy sober soft solar
solid spare spicy stable stark steady steep stern stout strange strict strong sturdy subtle sudden sunny supple sweet
swift tall tame tender thick thin tidy tiny tough tranquil upper urban useful vague valid vast velvet violet vivid
warm wary watchful weary white whole wide wild windy wise wooden woolen young zealous
""".split()

NOUNS = """
acorn actor almond anchor anvil apple apron arch armor arrow atlas attic bagel banjo barley barn barrel basin basket
beacon beaver bell bench berry blanket boat bonnet book bottle boulder bowl branch brass bread bridge brook broom
brush bucket buckle bugle butter button cabin cable cactus camel camera candle canoe canvas canyon card cargo carpet
carrot castle cedar cello chair chalk chapel cherry chess chimney cider circle circus citadel clay cliff cloak clock
cloud clover coast coat cobble coin collar comet compass copy corn cottage cotton couch cradle crane crater cricket
crown crystal cup curtain cushion daisy dance desk diamond dish dock dolphin donkey door dragon drawer drum duck eagle
easel elbow ember engine fabric falcon farmer feather fence fern ferry fiddle field finch flag flame flask flute foal
forest fork fountain fox frame garden garlic gate ginger giraffe glacier glove goose grain granite grape guitar hammer
hammock harbor harp hat hawk hazel hedge helmet heron hill hinge honey hood horn horse house inlet iron island ivory
jacket jar jasmine jewel jungle kettle key kite kitten knot ladder lagoon lake lamp lantern lark leaf lemon lens
letter lichen lily lion lizard locket loom lumber magnet mango mantle maple marble market mask meadow melon mill
mirror mitten monkey moon mortar moss mountain mug museum needle nest nickel nutmeg oak oar oasis ocean onion orchard
otter oven owl paddle palace panda paper parcel parrot pasture path peach pearl pebble pencil pepper piano pillow
pilot pine planet plaza plum pocket pond poplar porch potato prairie puddle pumpkin puppet quarry quartz quill quilt
rabbit radish raft rain raven reed reef ribbon ridge river robin rocket roof rope rose rudder saddle sail salmon
sandal sapling scarf school scroll shadow shelf shell ship shoe shovel shrine sketch sled slipper spade sparrow spider
spoon spring squirrel stable star statue stone stool storm stream street sugar summit sunset swan table tablet tailor
teapot temple thimble thistle thread throne thunder tiger timber torch tower trail train treasure tree trumpet tulip
tunnel turtle umbrella valley vase velvet village vine violin wagon wall walnut walrus water wave whale wheat wheel
whistle willow window winter wolf wool wreath yarn zebra
""".split()
