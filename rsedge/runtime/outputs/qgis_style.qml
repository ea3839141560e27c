<qgis version="3.28.0-Firenze" styleCategories="Symbology|Labeling|MapTips" labelsEnabled="1">
  <renderer-v2 type="categorizedSymbol" attr="status" symbollevels="0" enableorderby="0" forceraster="0" referencescale="-1">
    <categories>
      <category symbol="0" value="ok" type="string" label="ok" render="true" />
    </categories>
    <symbols>
      <symbol type="fill" name="0" alpha="1" clip_to_extent="1" force_rhr="0">
        <layer class="SimpleFill" enabled="1" locked="0" pass="0">
          <Option type="Map">
            <Option type="QString" name="border_width_map_unit_scale" value="3x:0,0,0,0,0,0" />
            <Option type="QString" name="color" value="0,158,115,128" />
            <Option type="QString" name="joinstyle" value="miter" />
            <Option type="QString" name="offset" value="0,0" />
            <Option type="QString" name="offset_map_unit_scale" value="3x:0,0,0,0,0,0" />
            <Option type="QString" name="offset_unit" value="MM" />
            <Option type="QString" name="outline_color" value="0,158,115,255" />
            <Option type="QString" name="outline_style" value="solid" />
            <Option type="QString" name="outline_width" value="0.2" />
            <Option type="QString" name="outline_width_unit" value="MM" />
            <Option type="QString" name="style" value="solid" />
          </Option>
        </layer>
      </symbol>
    </symbols>
    <rotation />
    <sizescale />
  </renderer-v2>
  <labeling type="simple">
    <settings calloutType="simple">
      <text-style fieldName="caption" isExpression="0" allowHtml="0" fontFamily="Noto Sans" fontSize="8" fontSizeUnit="Point" fontWeight="50" fontItalic="0" namedStyle="Regular" textColor="20,20,20,255" textOpacity="1" multilineHeight="1" blendMode="0">
        <text-buffer bufferDraw="1" bufferSize="0.7" bufferSizeUnits="MM" bufferColor="255,255,255,255" bufferOpacity="0.8" bufferNoFill="1" bufferJoinStyle="128" bufferBlendMode="0" />
      </text-style>
      <text-format autoWrapLength="28" useMaxLineLengthForAutoWrap="1" wrapChar="" multilineAlign="1" formatNumbers="0" addDirectionSymbol="0" />
      <placement placement="1" centroidWhole="1" centroidInside="1" quadOffset="4" fitInPolygonOnly="0" layerType="PolygonGeometry" priority="5" />
      <rendering drawLabels="1" scaleVisibility="1" scaleMin="0" scaleMax="100000" labelPerPart="0" obstacle="0" zIndex="0" />
    </settings>
  </labeling>
  <blendMode>0</blendMode>
  <featureBlendMode>0</featureBlendMode>
  <layerOpacity>1</layerOpacity>
  <mapTip enabled="1" />
  <layerGeometryType>2</layerGeometryType>
</qgis>
